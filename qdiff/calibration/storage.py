"""Activations of the whole calibration set: in RAM up to a budget, in unnamed temporary files beyond it."""

from __future__ import annotations

import math
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor


class ActivationStorage:
    """Allocates tensors that live in RAM while the budget lasts and in memory-mapped files after that.

    Both kinds are ordinary CPU tensors to their users. A file has no name once it is mapped, so nothing is left
    behind, however the program ends.

    Args:
        budget_bytes: RAM for activations; None has no limit.
        folder: where files go (default: the system's temporary folder).
    """

    def __init__(self, budget_bytes: int | None = None, folder: str | Path | None = None) -> None:
        self.budget = math.inf if budget_bytes is None else budget_bytes
        self.folder = folder
        self.in_ram = 0
        self.on_disk = 0
        self.peak = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor; its place is free again when the last view of it is gone."""
        size = math.prod(shape) * dtype.itemsize
        to_disk = self.in_ram + size > self.budget and size > 0
        if to_disk:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="qdiff-", suffix=".act") as file:
                file.truncate(size)
                tensor = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).reshape(shape)
        else:
            tensor = torch.empty(shape, dtype=dtype)
        name = "on_disk" if to_disk else "in_ram"
        setattr(self, name, getattr(self, name) + size)
        self.peak = max(self.peak, self.in_ram + self.on_disk)
        # Views share the storage, not the tensor: its end is the end of all of them.
        weakref.finalize(tensor.untyped_storage(), self._released, name, size)
        return tensor

    def _released(self, name: str, size: int) -> None:
        setattr(self, name, getattr(self, name) - size)
