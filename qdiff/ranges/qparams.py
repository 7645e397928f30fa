"""Step sizes and zero points of ranges."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.functional import max_level

TINY = 1e-8  # smallest step size: a constant 0 input has no range


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return δ = (high − low)/(2^b − 1) and z = round(−low/δ) as int32, of ranges that include 0."""
    delta = ((high - low) / max_level(bits)).clamp(min=TINY)
    return delta, torch.round(-low / delta).clamp(0, max_level(bits)).to(torch.int32)


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
