"""TFMQ-DM's ranges of activations: an exponential average of extremes that starts at a searched range."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.functional import at_least_single
from qdiff.ranges.least_error import LeastError, shrunk
from qdiff.ranges.qparams import qparams
from qdiff.ranges.range_estimator import stride

MOMENTUM, BATCH = 0.95, 16


class MovingAverage(LeastError):
    """Averages the extremes of batches of 16 samples: new = 0.95·old + 0.05·batch, regardless of ``running_momentum``.

    The average starts at the range of the first batch with the least mean |error|^2.4 (`LeastError`), whose extremes
    then count like those of every batch. For weights it is `LeastError`.
    """

    averages = True

    def __init__(self, running_momentum: float | None = None) -> None:
        super().__init__(running_momentum)
        self.extremes: list[tuple[Tensor, Tensor]] = []

    def update(self, x: Tensor) -> None:
        for batch in x.detach().split(BATCH):
            low, high = (at_least_single(end) for end in torch.aminmax(batch))
            if not self.extremes:
                values = batch.reshape(-1)
                step = stride(values.numel(), self.SAMPLE)
                self.kept = [values[::step].clone(), *([] if step == 1 else [low[None], high[None]])]
            self.extremes.append((low, high))
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)

    def qparams(self, bits: int, symmetric: bool, unsigned: bool) -> tuple[Tensor, Tensor]:
        first, last = (end[None] for end in self.extremes[0])
        rows = torch.cat([kept.float() for kept in self.kept])[None]
        low, high = (end[0] for end in shrunk(rows, first, last, bits, symmetric, unsigned))
        for batch_low, batch_high in self.extremes:
            low = MOMENTUM * low + (1 - MOMENTUM) * batch_low
            high = MOMENTUM * high + (1 - MOMENTUM) * batch_high
        return qparams(low, high, bits, symmetric, unsigned)
