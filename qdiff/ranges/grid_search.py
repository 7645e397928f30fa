"""EDA-DM's ranges, found by `qdiff.ranges.search`."""

from __future__ import annotations

from torch import Tensor

from qdiff.ranges.qparams import affine
from qdiff.ranges.range_estimator import RangeEstimator, stride
from qdiff.ranges.search import Side, search_range

SEARCH_MOMENTUM = 0.9  # EDA-DM averages the ranges of batches, regardless of --running_stat


class GridSearch(RangeEstimator):
    """Tries widths and zero points in 100 steps of 1 % and takes the range with the least mean |error|^2.4.

    For activations, a sample of each batch is searched, and the ranges are averaged with a momentum of 0.9, regardless
    of ``running_momentum``; all ranges are on the same side of 0 as the first batch.
    """

    BATCH_SAMPLE = 1 << 15  # values per batch; up to twice as many, because the stride between values is a whole number
    one_sided = True
    averages = True

    def __init__(self, running_momentum: float | None = None) -> None:
        super().__init__(running_momentum)
        self.batches: list[Tensor] = []

    @classmethod
    def choose(
        cls, rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, unsigned: bool
    ) -> tuple[Tensor, Tensor]:
        side = Side.POSITIVE if unsigned else Side.of(rows)
        return affine(*search_range(rows, bits, symmetric, side), bits)

    def step(self, count: int) -> int:
        return stride(count, self.BATCH_SAMPLE)

    def end_batch(self, low: Tensor, high: Tensor) -> None:
        """Keep the values of the batch apart from those of others, with its extremes, which some of the values miss."""
        super().end_batch(low, high)
        self.batches.append(self.with_extremes(low, high))
        self.kept = []

    def qparams(self, bits: int, symmetric: bool, unsigned: bool) -> tuple[Tensor, Tensor]:
        side = Side.POSITIVE if unsigned else Side.of(self.batches[0])
        average = None
        for values in self.batches:
            found = search_range(values[None].float(), bits, symmetric, side)
            # The first range is averaged with itself: that changes a last bit, and 2^b/2 − ½ then rounds as published.
            old = found if average is None else average
            average = [SEARCH_MOMENTUM * a + (1 - SEARCH_MOMENTUM) * b for a, b in zip(old, found, strict=True)]
        delta, zero_point = affine(*average, bits)
        return delta[0], zero_point[0]
