"""Q-Diffusion's and BRECQ's ranges: the shrunken extremes with the least error."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.ranges.errors import first_least, pick
from qdiff.ranges.qparams import qparams
from qdiff.ranges.range_estimator import RangeEstimator

SHRINK_STEPS = 80  # of 1 % each, down to 20 %


class LeastError(RangeEstimator):
    """Shrinks the extremes in 80 steps of 1 % and takes the range with the least mean |error|^2.4."""

    @classmethod
    def choose(
        cls, rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, unsigned: bool
    ) -> tuple[Tensor, Tensor]:
        return qparams(*shrunk(rows, low, high, bits, symmetric, unsigned), bits, symmetric, unsigned)


class QuickLeastError(LeastError):
    """The same, for activations on an eighth of the values that others keep."""

    SAMPLE = LeastError.SAMPLE >> 3


def shrunk(
    rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, unsigned: bool
) -> tuple[Tensor, Tensor]:
    """Return the extremes of each row, shrunk so that the error is least; arguments as in `LeastError.choose`."""
    # Made on the device: the host would wait for the copy of a list.
    steps = torch.arange(SHRINK_STEPS, dtype=torch.float64, device=low.device)
    factors = (1.0 - 0.01 * steps).to(low.dtype)
    lows, highs = low[:, None] * factors, high[:, None] * factors
    best = first_least(rows, *qparams(lows, highs, bits, symmetric, unsigned), bits)
    return pick(best, lows, highs)
