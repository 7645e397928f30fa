"""Choose δ and z of a quantizer from the values it will see."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qdiff.config import RangeMethod
from qdiff.functional import at_least_single, max_level
from qdiff.ranges.errors import first_least, pick
from qdiff.ranges.search import TINY, Side, affine, search_range

SHRINK_STEPS = 80  # Q-Diffusion and BRECQ shrink the range by 1 % at a time, down to 20 %
SEARCH_MOMENTUM = 0.9  # EDA-DM averages the ranges of batches, whatever --running_stat says


def qparams(low: Tensor, high: Tensor, bits: int, symmetric: bool, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    """Turn ranges into step sizes and zero points.

    The range is widened to include 0 before both δ and z are taken from it, so 0 is always represented exactly
    and an input such as [5, 7] keeps its levels.

    Args:
        low, high: extremes, any (equal) shape.
        bits: width b.
        symmetric: δ = max|x| / (2^(b−1) − 1) and z = 2^(b−1).
        unsigned: the input is never negative: z = 0 (takes precedence over ``symmetric``).

    Returns:
        δ float (low's shape) and z int32 (likewise, 0 … 2^b − 1).
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if unsigned:
        delta = (high / max_level(bits)).clamp(min=TINY)
        return delta, torch.zeros_like(delta, dtype=torch.int32)
    if symmetric:
        # One bit has no positive level beside 0: its range is [−max|x|, 0].
        positive = max(2 ** (bits - 1) - 1, 1)
        delta = (torch.maximum(-low, high) / positive).clamp(min=TINY)
        return delta, torch.full_like(delta, 2 ** (bits - 1), dtype=torch.int32)
    return affine(low, high, bits)


def estimate(
    x: Tensor,
    bits: int,
    method: RangeMethod,
    symmetric: bool,
    unsigned: bool = False,
    per_channel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose δ and z for a tensor.

    Args:
        x: the values; with ``per_channel`` every index of dimension 0 gets a range of its own.
        bits, symmetric, unsigned: see `qparams`.
        method: extremes, the least L2.4 error over 80 shrunken ranges, or `qdiff.ranges.search`.

    Returns:
        δ and z of shape () or, per channel, [C, 1, …] to broadcast against x.
    """
    rows = x.detach().reshape(x.shape[0] if per_channel else 1, -1).float()
    if method is RangeMethod.SEARCH:
        side = Side.POSITIVE if unsigned else Side.of(rows)
        delta, zero_point = affine(*search_range(rows, bits, symmetric, side), bits)
    else:
        low, high = rows.amin(dim=1), rows.amax(dim=1)
        find = qparams if method is RangeMethod.MIN_MAX else partial(_search, rows)
        delta, zero_point = find(low, high, bits, symmetric, unsigned)
    shape = [-1] + [1] * (x.dim() - 1) if per_channel else []
    return delta.reshape(shape), zero_point.reshape(shape)


def _search(
    rows: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool, unsigned: bool
) -> tuple[Tensor, Tensor]:
    factors = torch.tensor([1.0 - 0.01 * step for step in range(SHRINK_STEPS)], dtype=low.dtype, device=low.device)
    delta, zero_point = qparams(low[:, None] * factors, high[:, None] * factors, bits, symmetric, unsigned)
    return pick(first_least(rows, delta, zero_point, bits), delta, zero_point)


def _stride(count: int, wanted: int) -> int:
    """Odd, so that sampling an image whose sides are powers of two meets every column and channel."""
    return max(1, count // wanted) | 1


class RangeObserver:
    """Collects what one activation quantizer sees over several batches and settles on a range.

    Args:
        method: extremes over everything seen; the least error on a bounded sample of all values; or
            `qdiff.ranges.search` on a sample of each batch and a running average of the ranges found, all on the side
            of 0 where the first batch lies.
        running_momentum: with a number m, the extremes are an exponential average: new = m·old + (1 − m)·batch
            (the papers' ``--running_stat``, m = 0.95). SEARCH does not look at it.
    """

    SEARCH_SAMPLE = 1 << 15  # values of a batch that are searched, up to twice as many where a stride would halve them
    SAMPLE = 1 << 18  # values kept for the search: enough for a 16-bit tail, small enough for any layer

    def __init__(self, method: RangeMethod, running_momentum: float | None = None) -> None:
        self.method = method
        self.momentum = running_momentum
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self._kept: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take in one batch [N, …]."""
        # In float32 at least: δ and 1/δ of 16 bits are hardly float16 numbers.
        low, high = (at_least_single(end) for end in torch.aminmax(x.detach()))
        if self.low is None:
            self.low, self.high = low, high
        elif self.momentum is None:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            self.low = self.momentum * self.low + (1 - self.momentum) * low
            self.high = self.momentum * self.high + (1 - self.momentum) * high
        if self.method is RangeMethod.MSE:
            flat = x.detach().reshape(-1)
            self._kept.append(flat[:: _stride(flat.numel() * 4, self.SAMPLE)].clone())
        elif self.method is RangeMethod.SEARCH:
            flat = x.detach().reshape(-1)
            stride = _stride(flat.numel(), self.SEARCH_SAMPLE)
            sample = flat[::stride].clone() if stride == 1 else torch.cat([flat[::stride], low[None], high[None]])
            self._kept.append(sample)

    def qparams(self, bits: int, symmetric: bool, unsigned: bool) -> tuple[Tensor, Tensor]:
        """Return δ and z, both of shape ()."""
        if self.method is RangeMethod.MIN_MAX:
            return qparams(self.low, self.high, bits, symmetric, unsigned)
        if self.method is RangeMethod.SEARCH:
            return self._searched(bits, symmetric, unsigned)
        kept = torch.cat(self._kept)
        kept = kept[:: _stride(kept.numel(), self.SAMPLE)]
        # The extremes start the search, also those that the sample missed.
        rows = torch.cat([kept.clamp(self.low, self.high), self.low[None], self.high[None]])[None].float()
        delta, zero_point = _search(rows, self.low[None], self.high[None], bits, symmetric, unsigned)
        return delta[0], zero_point[0]

    def _searched(self, bits: int, symmetric: bool, unsigned: bool) -> tuple[Tensor, Tensor]:
        side = Side.POSITIVE if unsigned else Side.of(self._kept[0])
        average = None
        for kept in self._kept:
            found = search_range(kept[None].float(), bits, symmetric, side)
            # The first is averaged with itself: that moves a last bit, and 2^b/2 − ½ then rounds as published.
            old = found if average is None else average
            average = [SEARCH_MOMENTUM * a + (1 - SEARCH_MOMENTUM) * b for a, b in zip(old, found, strict=True)]
        delta, zero_point = affine(*average, bits)
        return delta[0], zero_point[0]
