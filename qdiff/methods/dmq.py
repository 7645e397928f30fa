"""DMQ (Lee et al., ICCV 2025): learned input scales, AdaRound per block, and activation ranges for every timestep.

Its registry row says that scales are learned first and which ranges follow, with finer step sizes for single channels
of shortcut layers; weights are fitted as by Q-Diffusion, on the inputs that the quantized weights before them give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdiff.methods.qdiffusion import QDiffusionConfig, calibrate

__all__ = ["DmqConfig", "calibrate"]


@dataclass(frozen=True)
class DmqConfig(QDiffusionConfig):
    """Q-Diffusion's numbers, which are DMQ's for the weights; ranges are observed and not learned, shared ones too."""

    learns_step_sizes: ClassVar[bool] = False
