"""Activations of the whole calibration set: on the GPU, or in RAM up to a budget and in unnamed temporary files."""

from __future__ import annotations

import math
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor


class ActivationStorage:
    """Allocates tensors in RAM until the budget is used up, and in memory-mapped files after that.

    Both kinds are ordinary CPU tensors to their users. A file is unlinked once it is mapped, so nothing is left behind,
    however the program ends. If everything fits on a GPU (`qdiff.calibration.memory_plan`), everything is stored there
    instead, so the tensors of one state are never on two devices.

    Args:
        budget_bytes: RAM for activations; None sets no limit.
        folder: where files go (default: the system's temporary folder).
        device: a GPU that holds everything; None uses RAM and files.
    """

    def __init__(
        self,
        budget_bytes: int | None = None,
        folder: str | Path | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = torch.device("cpu") if device is None else device
        self.budget = math.inf if budget_bytes is None else budget_bytes
        self.folder = folder
        self.in_ram = 0
        self.on_disk = 0
        self.on_device = 0
        self.peak = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor; its memory is released when the last view of it is gone."""
        size = math.prod(shape) * dtype.itemsize
        if self.device.type != "cpu":
            name, tensor = "on_device", torch.empty(shape, dtype=dtype, device=self.device)
        elif self.in_ram + size <= self.budget or size == 0:
            name, tensor = "in_ram", torch.empty(shape, dtype=dtype)
        else:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="qdiff-", suffix=".act") as file:
                file.truncate(size)
                mapped = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype)
            name, tensor = "on_disk", mapped.reshape(shape)
        setattr(self, name, getattr(self, name) + size)
        self.peak = max(self.peak, self.in_ram + self.on_disk + self.on_device)
        # Views share the storage, not the tensor, so the storage lives as long as any of them.
        weakref.finalize(tensor.untyped_storage(), self._released, name, size)
        return tensor

    def _released(self, name: str, size: int) -> None:
        setattr(self, name, getattr(self, name) - size)
