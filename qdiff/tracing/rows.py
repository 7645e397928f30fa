"""Where the samples of a batch are in what modules take and return, found by running one sample and two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Kernels sum in another order for another batch size; samples that are mixed differ by far more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Rows:
    """How a tensor's first dimension holds the samples.

    Attributes:
        per_sample: rows per sample: 1, or e.g. the number of heads of a mask.
        samples_first: a sample's rows follow each other; otherwise every N-th row belongs to one sample.
    """

    per_sample: int = 1
    samples_first: bool = True

    def by_sample(self, x: Tensor) -> Tensor:
        """Return a tensor [per_sample·N, …] as [N, …], or [N, per_sample, …] if a sample has several rows."""
        if self.per_sample == 1:
            return x
        if self.samples_first:
            return x.unflatten(0, (-1, self.per_sample))
        return x.unflatten(0, (self.per_sample, -1)).transpose(0, 1)

    def as_called(self, x: Tensor) -> Tensor:
        """Undo `by_sample`."""
        if self.per_sample == 1:
            return x
        return (x if self.samples_first else x.transpose(0, 1)).flatten(0, 1)


@dataclass(frozen=True)
class Count:
    """A whole number that grows with the batch, such as the batch size that some modules are called with.

    Attributes:
        per_sample: its value for one sample.
    """

    per_sample: int


def constant_or_count(one: Any, two: Any) -> Count | None:
    """Compare what is no tensor in a forward of one sample with the same in a forward of two.

    Returns:
        `Count` if it counts samples, None if it is the same for every batch.

    Raises:
        ValueError: it is neither.
    """
    if type(one) is type(two) is int and two == 2 * one != 0:
        return Count(one)
    if isinstance(one, str | int | float | complex | tuple | type(None)) and one != two:
        raise ValueError(f"is {one} for one sample and {two} for two")
    if hasattr(one, "__dict__") and any(isinstance(value, Tensor) for value in vars(one).values()):
        raise ValueError(f"holds tensors in an object of type {type(one).__name__}, where they cannot be replaced")
    return None


def rows_of_pair(one: Tensor, two: Tensor) -> Rows | None:
    """Compare a tensor in a forward of one sample with the same tensor in a forward of that sample and another.

    Returns:
        How the samples lie in it; None if it is the same for every batch.

    Raises:
        ValueError: the samples are not along the first dimension, or they influence each other.
    """
    if one.shape == two.shape:
        if not _close(one, two):
            raise ValueError("depends on what else is in the batch")
        return None
    if one.shape[1:] != two.shape[1:] or two.shape[0] != 2 * one.shape[0]:
        raise ValueError(f"has the shape {tuple(one.shape)} for one sample and {tuple(two.shape)} for two")
    for rows in (Rows(one.shape[0], True), Rows(one.shape[0], False)):
        if _close(rows.by_sample(one)[0], rows.by_sample(two)[0]):
            return rows
    raise ValueError("depends on what else is in the batch")


def _close(a: Tensor, b: Tensor) -> bool:
    if a.is_meta:  # only shapes are known
        return True
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.double(), b.double()
    scale = a.abs().max().item() if a.numel() else 0.0
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)
