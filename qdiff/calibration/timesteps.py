"""The timesteps of calibration samples: how a set is drawn, and how many samples each step gives.

Either evenly spaced steps give equally many samples (`spaced`), or step i of a sampling run gives counts[i]
samples, int64 [T] with the sum N. Steps are in sampling order, so step 0 is the noisiest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from qdiff.errors import UserError

# PTQ4DM's distribution of timesteps, in units of T.
NORMAL_MEAN, NORMAL_STD = 0.4, 0.4


class Spacing(str, Enum):
    """Which of a run's steps are kept where fewer are asked for."""

    EVERY = "every"  # every ⌊recorded/count⌋-th from the first (Q-Diffusion): of 25 steps, 20 are the first 20
    ENDS = "ends"  # from the first to the last one


class Schedule(str, Enum):
    """How samples are distributed over timesteps."""

    TDAC = "tdac"  # where the network's features are dense and unlike those of other steps (EDA-DM)
    NORMAL = "normal"  # timesteps from a normal distribution (PTQ4DM)
    UNIFORM = "uniform"  # equally many from every step (Q-Diffusion)


@dataclass(frozen=True)
class Draw:
    """A calibration set in which every sampled image gives one sample, at a step chosen by the distribution.

    Attributes:
        schedule: the distribution of samples over timesteps.
        count: N, the number of images.
        batch_size: images per sampled batch, and the most images whose features TDAC compares.
        lamda: λ, weight of variety relative to density (TDAC).
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
            raise UserError(f"--lamda is {self.lamda}; give a finite number of at least 0")
        if not self.radius > 0:
            raise UserError(f"--tdac_radius is {self.radius}; give it above 0")


def spaced(recorded: int, count: int, spacing: Spacing = Spacing.EVERY) -> list[int]:
    """Return ``count`` step indices out of ``recorded``, ascending.

    Raises:
        UserError: more steps are requested than recorded, or fewer than one.
    """
    if not 1 <= count <= recorded:
        raise UserError(
            f"{count} calibration steps were requested but {recorded} are recorded; give --cali_st 1 to {recorded}"
        )
    if spacing is Spacing.EVERY:
        return list(range(0, recorded, recorded // count))[:count]
    if count == 1:
        return [(recorded - 1) // 2]
    gaps = count - 1
    return [(2 * i * (recorded - 1) + gaps) // (2 * gaps) for i in range(count)]  # rounded half up


def ends_early(recorded: Tensor, visited: Iterable[float]) -> bool:
    """Return whether no sample is later in a sampling run than its last call but one.

    Args:
        recorded: t [N] of the samples.
        visited: the timesteps of the run's calls, in any order; nothing ends early where they are unknown, so empty.
    """
    latest = sorted(set(visited))[:2]
    return len(latest) == 2 and float(recorded.min()) >= latest[1]


def uniform_counts(steps: int, count: int) -> Tensor:
    """Return equal counts, int64 [steps], with the sum ``count``; a remainder is spread over the whole run.

    Raises:
        UserError: fewer than one sample.
    """
    _check(steps, count)
    return (torch.arange(steps + 1) * count // steps).diff()


def normal_counts(steps: int, count: int, generator: torch.Generator) -> Tensor:
    """Return counts, int64 [steps], of timesteps drawn from a normal distribution (PTQ4DM), with the sum ``count``.

    Timesteps are drawn with mean 0.4·T and standard deviation 0.4·T, T = ``steps``; the drawn values are then stretched
    from their own minimum and maximum to [0, T − 1] and rounded. Timestep 0 is the CLEAN end, which a sampling run
    reaches last, so a drawn timestep t counts for step T − 1 − t. (Stretching cancels the mean and the deviation: the
    bell always spans the whole run, and is centred on its middle on average.)

    Args:
        generator: decides the draw.

    Raises:
        UserError: fewer than one sample.

    Source: Shang et al. 2023, "Post-training Quantization on Diffusion Models", as EDA-DM runs it for comparison.
    """
    _check(steps, count)
    drawn = NORMAL_MEAN * steps + NORMAL_STD * steps * torch.randn(count, generator=generator, dtype=torch.float64)
    spread = drawn.max() - drawn.min()
    if spread > 0:
        drawn = (drawn - drawn.min()) / spread * (steps - 1)
    timestep = drawn.round().long().clamp(0, steps - 1)  # a single draw cannot be stretched
    return (steps - 1 - timestep).bincount(minlength=steps)


def _check(steps: int, count: int) -> None:
    if steps < 1:
        raise ValueError(f"a sampling run of {steps} steps")
    if count < 1:
        raise UserError(f"the number of calibration samples is {count}; give at least 1")
