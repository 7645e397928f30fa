"""EDA-DM's ranges: those of `qdiff.ranges.search`."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.ranges.qparams import affine
from qdiff.ranges.range_estimator import RangeEstimator, stride
from qdiff.ranges.search import Side, search_range

SEARCH_MOMENTUM = 0.9  # EDA-DM averages the ranges of batches, whatever --running_stat says


class GridSearch(RangeEstimator):
    """Tries widths and zero points in 100 steps of 1 % and takes the range with the least mean |error|^2.4.

    Of batches, a sample of each is searched, and the ranges found are averaged with a momentum of 0.9 whatever
    ``running_momentum`` is; all are on the side of 0 where the first batch lies.
    """

    BATCH_SAMPLE = 1 << 15  # values of a batch, up to twice as many where a stride would halve them
    one_sided = True

    @classmethod
    def choose(
        cls, rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, unsigned: bool
    ) -> tuple[Tensor, Tensor]:
        side = Side.POSITIVE if unsigned else Side.of(rows)
        return affine(*search_range(rows, bits, symmetric, side), bits)

    def keep(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        step = stride(values.numel(), self.BATCH_SAMPLE)
        sample = values[::step].clone() if step == 1 else torch.cat([values[::step], low[None], high[None]])
        self.kept.append(sample)

    def qparams(self, bits: int, symmetric: bool, unsigned: bool) -> tuple[Tensor, Tensor]:
        side = Side.POSITIVE if unsigned else Side.of(self.kept[0])
        average = None
        for kept in self.kept:
            found = search_range(kept[None].float(), bits, symmetric, side)
            # The first is averaged with itself: that moves a last bit, and 2^b/2 − ½ then rounds as published.
            old = found if average is None else average
            average = [SEARCH_MOMENTUM * a + (1 - SEARCH_MOMENTUM) * b for a, b in zip(old, found, strict=True)]
        delta, zero_point = affine(*average, bits)
        return delta[0], zero_point[0]
