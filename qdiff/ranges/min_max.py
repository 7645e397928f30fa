"""Ranges from minimum to maximum."""

from __future__ import annotations

from torch import Tensor

from qdiff.ranges.qparams import qparams
from qdiff.ranges.range_estimator import RangeEstimator


class MinMax(RangeEstimator):
    """Takes the extremes; keeps no values."""

    @classmethod
    def choose(
        cls, rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, unsigned: bool
    ) -> tuple[Tensor, Tensor]:
        return qparams(low, high, bits, symmetric, unsigned)

    def step(self, count: int) -> None:
        return None

    def qparams(self, bits: int, symmetric: bool, unsigned: bool) -> tuple[Tensor, Tensor]:
        return qparams(self.low, self.high, bits, symmetric, unsigned)
