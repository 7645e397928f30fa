"""GRIP, our own recipe: weights rounded in closed form, and precision where the images need it.

GPTQ-Rounded, Input-Precise. It is GPTQ towards the float network's output (`qdiff.methods.gptq`) with

- widths chosen layer by layer, by commands, which have a sampler to go through: those that are asked for are means, and
  size and bit operations are those of uniform widths. What a layer's rounding does to the sampler's result decides
  (`qdiff.calibration.trajectory_sensitivity`). With dynamic ranges and modulation, only weights are chosen, and the
  inputs of the first and the last layer have 16 bits;
- calibration from the first to the last timestep of a run: the papers' choice leaves out the last ones where their
  number does not divide that of the steps, and there activations are largest (`Method.spacing`);
- without a sampler, 8-bit weights and 16-bit inputs in the first and the last layer. The first one takes x_t, and at
  the last steps 8 bits of it are coarser than the noise that is left in it; both layers together are less than 1 % of
  the bit operations;
- quantizers of their own for both parts of a concatenation (Q-Diffusion's split);
- weight ranges of least error, without which the column rounding has to work on a grid for outliers, and ranges of
  least error for activations, searched on fewer values than elsewhere.

Nothing is learned, and nothing has to be set. docs/results.md has the ablation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qdiff.config import FIRST, LAST
from qdiff.methods import gptq
from qdiff.ranges.estimators import RangeMethod

calibrate = gptq.calibrate
END_BITS = "W8A16"
QUANT: Mapping[str, Any] = MappingProxyType(
    {
        "split_shortcut": True,
        "weight_range": RangeMethod.MSE,
        "act_range": RangeMethod.QUICK,
        "layer_bits": MappingProxyType({FIRST: END_BITS, LAST: END_BITS}),
    }
)
"""Its fields of `QuantConfig` besides the widths; where it chooses these, no layer is named."""
OPTIONS: Mapping[str, str] = gptq.OPTIONS


@dataclass(frozen=True)
class GripConfig(gptq.GptqConfig):
    """The method's numbers: those of GPTQ."""
