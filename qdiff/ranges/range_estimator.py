"""The interface of range estimators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from qdiff.functional import at_least_single


class Observer(ABC):
    """What an activation quantizer shows values to, which then pass unchanged.

    Attributes:
        share: which share of its batch the next tensor is. A batch that is too large for one pass comes in parts, one
            after another, and counts as one.
    """

    share = Fraction(1)

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take in the values of one more tensor."""


class RangeEstimator(Observer):
    """Chooses δ and z of a quantizer from the values that it will see.

    For a weight, all values are known, and `choose` returns δ and z at once. For activations, an instance collects
    batch after batch (`update`) and returns δ and z at the end (`qparams`). A new estimator is a file with a class and
    a row in `qdiff.ranges.estimators`; the minimum is

        class MiddleNinety(RangeEstimator):
            @classmethod
            def choose(cls, rows, low, high, bits, symmetric, unsigned):
                low, high = torch.quantile(rows, torch.tensor([0.05, 0.95]), dim=1)
                return qparams(low, high, bits, symmetric, unsigned)

    Args:
        running_momentum: with a number m, the extremes are an exponential average, new = m·old + (1 − m)·batch (the
            papers' ``--running_stat``, m = 0.95); None takes the extremes over all batches.

    Attributes:
        low, high: extremes of the batches so far, of shape (); None before the end of the first.
        kept: values kept from each batch, or from each of its parts.
        values: the number of values of the batch that is under way.
    """

    SAMPLE = 1 << 18  # values used in the end: enough for the tails at 16 bits, few enough for any layer
    one_sided: ClassVar[bool] = False
    """Whether the symmetric range of values on one side of 0 puts all its levels on that side."""
    averages: ClassVar[bool] = False
    """Whether batches always count the less, the earlier they come, so that they must come in random order."""

    def __init__(self, running_momentum: float | None = None) -> None:
        self.momentum = running_momentum
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.kept: list[Tensor] = []
        self.values = 0
        self._seen = Fraction(0)  # the share of the batch that is under way
        self._ends: tuple[Tensor, Tensor] | None = None

    @classmethod
    @abstractmethod
    def choose(
        cls, rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, unsigned: bool
    ) -> tuple[Tensor, Tensor]:
        """Choose δ and z for each row.

        Args:
            rows: [C, n] float32.
            low, high: [C]: extremes of the rows.
            bits, symmetric, unsigned: see `qdiff.ranges.qparams.qparams`.

        Returns:
            δ float [C] and z int32 [C].
        """

    def update(self, x: Tensor) -> None:
        """Collect one batch [N, …], or a part of one."""
        self._add(x.detach().reshape(-1), self.share)

    def _add(self, values: Tensor, share: Fraction) -> None:
        # At least float32: at 16 bits, float16 can hardly represent δ and 1/δ.
        low, high = (at_least_single(end) for end in torch.aminmax(values))
        if self._ends is not None:
            low, high = torch.minimum(self._ends[0], low), torch.maximum(self._ends[1], high)
        self._ends = low, high
        step = self.step(round(values.numel() / share))
        if step is not None:
            # Those of the whole batch that are a multiple of the step.
            self.kept.append(values[-self.values % step :: step].clone())
        self._seen, self.values = self._seen + share, self.values + values.numel()
        if self._seen >= 1:
            self.end_batch(low, high)
            self._seen, self.values, self._ends = Fraction(0), 0, None

    def step(self, count: int) -> int | None:
        """Return the step between the values that are kept of a batch, by default of a quarter of `SAMPLE` values.

        Args:
            count: values of the batch.

        Returns:
            The step, or None to keep no values.
        """
        return stride(count * 4, self.SAMPLE)

    def end_batch(self, low: Tensor, high: Tensor) -> None:
        """Take in the extremes of a batch, whose values have been kept."""
        if self.low is None:
            self.low, self.high = low, high
        elif self.momentum is None:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            self.low = self.momentum * self.low + (1 - self.momentum) * low
            self.high = self.momentum * self.high + (1 - self.momentum) * high

    def with_extremes(self, low: Tensor, high: Tensor) -> Tensor:
        """Return ``kept`` at the end of the one batch that it is of, with the extremes if it misses some of the values.

        Args:
            low, high: extremes of the batch.
        """
        kept = torch.cat(self.kept)
        return kept if len(kept) == self.values else torch.cat([kept, low[None], high[None]])

    def qparams(self, bits: int, symmetric: bool, unsigned: bool) -> tuple[Tensor, Tensor]:
        """Return δ and z, both of shape (); by default chosen for the kept values and the extremes."""
        kept = torch.cat(self.kept)
        kept = kept[:: stride(kept.numel(), self.SAMPLE)]
        # Add the extremes, which the sample may have missed.
        rows = torch.cat([kept.clamp(self.low, self.high), self.low[None], self.high[None]])[None].float()
        delta, zero_point = self.choose(rows, self.low[None], self.high[None], bits, symmetric, unsigned)
        return delta[0], zero_point[0]


def stride(count: int, wanted: int) -> int:
    """Return the step between about ``wanted`` of ``count`` values.

    It is odd, so that a sample of an image whose sides are powers of two includes every column and channel.
    """
    return max(1, count // wanted) | 1
