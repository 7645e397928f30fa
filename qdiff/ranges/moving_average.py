"""TFMQ-DM's ranges of activations: an exponential average of extremes that starts at a searched range."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from qdiff.ranges.least_error import LeastError, shrunk
from qdiff.ranges.qparams import qparams
from qdiff.ranges.range_estimator import stride

MOMENTUM, BATCH = 0.95, 16


class MovingAverage(LeastError):
    """Averages the extremes of batches of 16 rows: new = 0.95·old + 0.05·batch, regardless of ``running_momentum``.

    The average starts at the range of the first batch with the least mean |error|^2.4 (`LeastError`), whose extremes
    then count like those of every batch. For weights it is `LeastError`.
    """

    averages = True

    def __init__(self, running_momentum: float | None = None) -> None:
        super().__init__(running_momentum)
        self.extremes: list[tuple[Tensor, Tensor]] = []
        self._rows = 0  # of what `share` is a share of, those that came

    def update(self, x: Tensor) -> None:
        rows, done = round(len(x) / self.share), 0
        while done < len(x):
            first = self._rows // BATCH * BATCH
            size = min(BATCH, rows - first)
            part = x[done : done + first + size - self._rows].detach()
            self._add(part.reshape(-1), Fraction(len(part), size))
            done += len(part)
            self._rows = (self._rows + len(part)) % rows

    def step(self, count: int) -> int | None:
        return None if self.extremes else stride(count, self.SAMPLE)

    def end_batch(self, low: Tensor, high: Tensor) -> None:
        super().end_batch(low, high)
        if not self.extremes:
            self.kept = [self.with_extremes(low, high)]
        self.extremes.append((low, high))

    def qparams(self, bits: int, symmetric: bool, unsigned: bool) -> tuple[Tensor, Tensor]:
        first, last = (end[None] for end in self.extremes[0])
        rows = torch.cat(self.kept).float()[None]
        low, high = (end[0] for end in shrunk(rows, first, last, bits, symmetric, unsigned))
        for batch_low, batch_high in self.extremes:
            low = MOMENTUM * low + (1 - MOMENTUM) * batch_low
            high = MOMENTUM * high + (1 - MOMENTUM) * batch_high
        return qparams(low, high, bits, symmetric, unsigned)
