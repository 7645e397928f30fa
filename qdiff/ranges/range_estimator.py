"""The interface of range estimators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from qdiff.functional import at_least_single


class Observer(ABC):
    """What an activation quantizer shows values to, which then pass unchanged."""

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
        low, high: extremes so far, of shape (); None before the first batch.
        kept: values kept from the batches.
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
        """Collect one batch [N, …]."""
        # At least float32: at 16 bits, float16 can hardly represent δ and 1/δ.
        low, high = (at_least_single(end) for end in torch.aminmax(x.detach()))
        if self.low is None:
            self.low, self.high = low, high
        elif self.momentum is None:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            self.low = self.momentum * self.low + (1 - self.momentum) * low
            self.high = self.momentum * self.high + (1 - self.momentum) * high
        self.keep(x.detach().reshape(-1), low, high)

    def keep(self, values: Tensor, low: Tensor, high: Tensor) -> None:
        """Keep what `qparams` needs from a batch; by default a quarter of `SAMPLE` values, evenly spaced.

        Args:
            values: [n], the values of the batch.
            low, high: extremes of the batch.
        """
        self.kept.append(values[:: stride(values.numel() * 4, self.SAMPLE)].clone())

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
