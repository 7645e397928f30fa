"""Power-of-two scaling of shortcut layers (DMQ's PTS; Lee et al., ICCV 2025): finer step sizes of single channels.

The input of a shortcut convolution has passed no normalization, so its channels differ in size, and a small one uses
few of the levels of the one step size δ. So a channel may have δ/2, δ/4 or δ/8 instead, with the same zero point. Every
calibration sample names the best one for every channel by squared error, and a channel takes what almost all samples
agree on, else δ. Powers of two keep integer products exact: the weight's integers are shifted accordingly
(`qdiff.kernels.integer_matmul`).

Ranges per timestep have votes per timestep: ``channel_shifts`` is a table [T, C] like δ and z, with T = 1 for shared
ranges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from qdiff.functional import MOST_SHIFT, at_least_single, fake_quantize_inference
from qdiff.quantizer import ActQuantizer, TimestepActQuantizer
from qdiff.ranges.range_estimator import Observer

PERCENT = 85  # of the samples must agree
Samples = TypeVar("Samples")


class ChannelVotes(Observer):
    """Counts which of the step sizes δ/2^k is best for each channel, sample by sample.

    Args:
        quantizer: its range is set.
    """

    def __init__(self, quantizer: ActQuantizer) -> None:
        self.quantizer = quantizer
        self.counts: Tensor | None = None
        self.samples = 0

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Count the votes of one batch [N, C, length…]."""
        delta, zero_point = self.quantizer.tensor_range_of(x)
        x = at_least_single(x)
        errors = []
        for k in range(MOST_SHIFT + 1):
            error = fake_quantize_inference(x, delta / 2**k, zero_point, self.quantizer.bits).sub_(x).square_()
            errors.append(error.flatten(2).sum(2))
        # Of equal errors the first is taken: a channel that is always 0 keeps the tensor's step size.
        best = torch.stack(errors).argmin(0)
        counts = torch.stack([(best == k).sum(0) for k in range(MOST_SHIFT + 1)])
        self.counts = counts if self.counts is None else self.counts + counts
        self.samples += len(x)

    def shifts(self) -> Tensor:
        """Return k of every channel, uint8 [C]."""
        most, mode = self.counts.max(0)
        return torch.where(100 * most >= PERCENT * self.samples, mode, 0).to(torch.uint8)


def vote(
    quantizers: Sequence[ActQuantizer],
    groups: Sequence[tuple[int, Samples]],
    show: Callable[[Samples], None],
) -> None:
    """Set the channels' shifts of those quantizers that have a place for them and whose ranges are set.

    Args:
        quantizers: those without such a place are left alone; their ranges are set too.
        groups, show: as for `qdiff.calibration.observe.observe`, which ends the observing.
    """
    voting = [q for q in quantizers if q.channel_shifts is not None]
    if not voting:
        return
    for entry, some in groups:
        for quantizer in voting:
            if not isinstance(quantizer.observer, ChannelVotes) or isinstance(quantizer, TimestepActQuantizer):
                quantizer.observer = ChannelVotes(quantizer)
        show(some)
        for quantizer in voting:
            quantizer.channel_shifts[entry] = quantizer.observer.shifts()
