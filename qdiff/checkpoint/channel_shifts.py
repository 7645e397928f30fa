"""The shifts of channels' step sizes (`qdiff.calibration.power_of_two`) as one tensor of a native file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qdiff.kernels.packing import pack, unpack
from qdiff.quantizer import ActQuantizer

SHIFT_BITS = 2  # 0 to `qdiff.functional.MOST_SHIFT`


def stored_shifts(quantizers: Sequence[ActQuantizer]) -> list[Tensor]:
    """Return the shifts of all quantizers that have some as one packed stream; nothing if none has."""
    found = [q.channel_shifts.flatten() for q in quantizers if q.channel_shifts is not None]
    return [pack(torch.cat(found).cpu(), SHIFT_BITS)] if found else []


def shifts_of_each(
    quantizers: Sequence[ActQuantizer], stored: Tensor | None, entries: int
) -> dict[ActQuantizer, Tensor]:
    """Inverse of `stored_shifts`.

    Args:
        stored: the stream; None, of a file without one, is no shift at all.
        entries: T, the number of calibrated timesteps; 1 for shared ranges.

    Raises:
        ValueError: the stream has another length.
    """
    shifting = [q for q in quantizers if q.channel_shifts is not None]
    if stored is None or not shifting:
        return {}
    counts = [entries * q.channel_shifts.shape[1] for q in shifting]
    parts = unpack(stored, SHIFT_BITS, sum(counts)).split(counts)
    return {q: part.view(entries, -1) for q, part in zip(shifting, parts, strict=True)}
