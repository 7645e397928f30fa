"""Q-Diffusion's and BRECQ's ranges: the shrunken extremes that lose least."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.ranges.errors import first_least, pick
from qdiff.ranges.qparams import qparams
from qdiff.ranges.range_estimator import RangeEstimator

SHRINK_STEPS = 80  # by 1 % at a time, down to 20 %


class LeastError(RangeEstimator):
    """Shrinks the extremes in 80 steps of 1 % and takes the range with the least mean |error|^2.4."""

    @classmethod
    def choose(
        cls, rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, unsigned: bool
    ) -> tuple[Tensor, Tensor]:
        factors = torch.tensor([1.0 - 0.01 * step for step in range(SHRINK_STEPS)], dtype=low.dtype, device=low.device)
        delta, zero_point = qparams(low[:, None] * factors, high[:, None] * factors, bits, symmetric, unsigned)
        return pick(first_least(rows, delta, zero_point, bits), delta, zero_point)
