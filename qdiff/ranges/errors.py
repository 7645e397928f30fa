"""Which of many ranges loses least, and how much of it is computed at a time on which device."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.functional import dequantize, quantize

ERROR_NORM = 2.4  # p
CACHED_VALUES = 1 << 16  # stay in a core's cache
# Away from the CPU a launch costs more than what it computes on few values: chunks are as large as memory allows, 1 GiB
# in all. A step of the arithmetic holds at most 4 tensors of its size.
DEVICE_BYTES = 1 << 30
DEVICE_VALUES = DEVICE_BYTES // 2 // (4 * torch.float32.itemsize)


def values_at_a_time(device: torch.device) -> int:
    """Return how many values a tensor should have that only lives for a step; results do not depend on it."""
    return CACHED_VALUES if device.type == "cpu" else DEVICE_VALUES


def first_least(rows: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return which of K quantizers has the least mean |error|^2.4 on each row, the first of equals.

    Args:
        rows: [C, n].
        delta, zero_point: [C, K].
        bits: width b.

    Returns:
        [C] int64; 0 where no error is a finite number.
    """
    values, n = values_at_a_time(rows.device), rows.shape[1]
    some = max(1, values // n)
    by_row = zip(rows.split(some), delta.split(some), zero_point.split(some), strict=True)
    return torch.cat([_first_least(*part, bits, max(1, values // (n * len(part[0])))) for part in by_row])


def _first_least(rows: Tensor, delta: Tensor, zero_point: Tensor, bits: int, at_a_time: int) -> Tensor:
    some = zip(delta.split(at_a_time, 1), zero_point.split(at_a_time, 1), strict=True)
    errors = torch.cat([_errors(rows[:, None], d[..., None], z[..., None], bits) for d, z in some], dim=1)
    errors = torch.where(errors.isnan(), torch.inf, errors)
    count = errors.shape[1]
    # `argmin` leaves open which of equals it returns.
    places = torch.where(errors == errors.amin(dim=1, keepdim=True), torch.arange(count, device=rows.device), count)
    return places.amin(dim=1)


def pick(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Return each row's value [C] of values [C, K]."""
    return tuple(v.gather(1, index[:, None])[:, 0] for v in values)


def _errors(rows: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    restored = dequantize(quantize(rows, delta, zero_point, bits), delta, zero_point)
    return restored.sub_(rows).abs_().pow_(ERROR_NORM).mean(dim=2)
