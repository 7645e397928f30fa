"""PTQ4DM (Shang et al., CVPR 2023) on EDA-DM's recipe: the two differ only in what their papers say.

Its calibration set has normally distributed timesteps (`qdiff.calibration.timesteps`), and layers' errors do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdiff.errors import UserError
from qdiff.methods.eda_dm import EdaDmConfig, calibrate

__all__ = ["Ptq4dmConfig", "calibrate"]


@dataclass(frozen=True)
class Ptq4dmConfig(EdaDmConfig):
    """EDA-DM's numbers without its fine-grained reconstruction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_weight != 0:
            raise UserError("--method ptq4dm contradicts --add_loss, which only EDA-DM uses; leave one of them out")
