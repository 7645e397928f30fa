"""Device and processes: CUDA where there is one, several processes under torchrun."""

from __future__ import annotations

import datetime
import os
import resource
from typing import Any

import torch

from qdiff.errors import UserError


def choose_device(name: str | None) -> torch.device:
    """Return the device that ``--device`` names; by default CUDA where there is one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; give cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise UserError(f"--device {name} is not there ({count} CUDA devices found); give --device cpu")
    elif device.type != "cpu":
        raise UserError(f"--device {name} is not supported; give cpu, cuda or cuda:N")
    return device


class Processes:
    """One process, or several under torchrun, by Lightning Fabric.

    Attributes:
        rank, count: this process and how many there are.
        device: this process's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.count = device, 0, int(os.environ.get("WORLD_SIZE", "1"))
        self._fabric: Any = None
        if self.count == 1:
            return
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy

        on_gpu = device.type == "cuda"
        strategy = DDPStrategy(
            process_group_backend="nccl" if on_gpu else "gloo",
            # The others wait while the first process calibrates, which may take hours.
            timeout=datetime.timedelta(days=7),
        )
        nodes = self.count // int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        self._fabric = Fabric(
            accelerator="cuda" if on_gpu else "cpu",
            devices=self.count // nodes,
            num_nodes=nodes,
            strategy=strategy,
        )
        self._fabric.launch()
        self.rank, self.device = self._fabric.global_rank, self._fabric.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self._fabric is not None:
            self._fabric.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value (anything picklable), in rank order."""
        if self._fabric is None:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


def peak_memory_bytes(device: torch.device) -> dict[str, int]:
    """Return the process's peak resident memory and, on CUDA, the peak allocated on the device, in bytes."""
    peak = {"ram": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
