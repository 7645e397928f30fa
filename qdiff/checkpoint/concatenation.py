"""Many tensors as one: a native file holds the concatenation over all layers, since every name costs bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def concatenated(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the values of all tensors in one, on the CPU; empty if there are none."""
    return torch.cat([t.detach().reshape(-1).cpu().to(dtype) for t in tensors] or [torch.empty(0, dtype=dtype)])


def split(values: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """Return parts of these sizes; raises a ValueError if they are not all of ``values``."""
    if values.numel() != sum(sizes):
        raise ValueError(f"{values.numel()} values where {sum(sizes)} are needed")
    return values.split(list(sizes))


def separated(values: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Inverse of `concatenated`: return parts in the shapes of ``like``; raises as `split`."""
    parts = split(values, [t.numel() for t in like])
    return [part.reshape(t.shape) for part, t in zip(parts, like, strict=True)]
