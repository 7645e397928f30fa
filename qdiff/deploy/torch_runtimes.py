"""The runtimes in torch: simulation, and weights that stay packed."""

from __future__ import annotations

from qdiff.deploy.runtime import Runtime

SIMULATED = Runtime(name="simulated", help="weights dequantized once (default)", packs=False)
PACKED = Runtime(name="torch", help="weights stay packed", takes_weight_cache=True)
INTEGER = Runtime(name="torch-int8", help="and layers multiply integers", multiplies_integers=True)
