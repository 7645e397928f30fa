"""Find the range with the least error among many, in chunks that fit the device."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.functional import dequantize, quantize

ERROR_NORM = 2.4  # p
CACHED_VALUES = 1 << 16  # values that stay in a core's cache
# On other devices than the CPU, a kernel launch takes longer than computing a few values, so chunks are as large as
# 1 GiB in all allows. A step of the arithmetic holds at most 4 tensors of a chunk's size.
DEVICE_BYTES = 1 << 30
DEVICE_VALUES = DEVICE_BYTES // 2 // (4 * torch.float32.itemsize)


def values_at_a_time(device: torch.device) -> int:
    """Return how many values a temporary tensor should have; results do not depend on it."""
    return CACHED_VALUES if device.type == "cpu" else DEVICE_VALUES


def first_least(rows: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return which of K quantizers has the least mean |error|^2.4 on each row, the first of equals.

    Args:
        rows: [C, n].
        delta, zero_point: [C, K].
        bits: width b.

    Returns:
        [C] int64; 0 for rows without a finite error.
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
    # `argmin` does not specify which of several equal minima it returns.
    places = torch.where(errors == errors.amin(dim=1, keepdim=True), torch.arange(count, device=rows.device), count)
    return places.amin(dim=1)


def pick(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Return for each of ``values`` [C, K] the element of each row at ``index`` [C], [C]."""
    return tuple(v.gather(1, index[:, None])[:, 0] for v in values)


def _errors(rows: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    restored = dequantize(quantize(rows, delta, zero_point, bits), delta, zero_point)
    return restored.sub_(rows).abs_().pow_(ERROR_NORM).mean(dim=2)
