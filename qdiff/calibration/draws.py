"""Where calibration samples come from: how many each of a sampler's steps gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from qdiff.errors import UserError


class Schedule(str, Enum):
    """How samples are distributed over timesteps."""

    TDAC = "tdac"  # where the network's features are dense and unlike those of other steps (EDA-DM)
    NORMAL = "normal"  # timesteps from a normal distribution (PTQ4DM)
    UNIFORM = "uniform"  # all alike (Q-Diffusion)


@dataclass(frozen=True)
class Draw:
    """A calibration set in which every sampled image gives one sample, at a step that the schedule chooses.

    Attributes:
        schedule: see the enum.
        count: N, how many images.
        batch_size: images sampled at a time, and at most so many whose features TDAC looks at.
        lamda: λ, weight of variety against density (TDAC).
        radius: r, mean squared distance up to which two steps' features count as near (TDAC).
    """

    schedule: Schedule = Schedule.TDAC
    count: int = 1024
    batch_size: int = 64
    lamda: float = 1.0
    radius: float = 3.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", Schedule(self.schedule))
        for name, option in (("count", "--calib_num_samples"), ("batch_size", "--batch_samples")):
            if getattr(self, name) < 1:
                raise UserError(f"{option} is {getattr(self, name)}; give at least 1")
        if not 0 <= self.lamda < math.inf:
            raise UserError(f"--lamda is {self.lamda}; give a finite number from 0")
        if not self.radius > 0:
            raise UserError(f"--tdac_radius is {self.radius}; give it above 0")
