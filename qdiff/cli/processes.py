"""Device and processes: CUDA if available, and one or several processes (torchrun)."""

from __future__ import annotations

import datetime
import os
import resource
from typing import Any

import torch

from qdiff.errors import UserError


def choose_device(name: str | None, tf32: bool = False) -> torch.device:
    """Return the device that ``--device`` names; by default CUDA if available, else the CPU.

    Under torchrun, each process takes the GPU with its local rank. On CUDA this also decides for the whole process
    whether the inputs of float32 products may be rounded to TF32.

    Args:
        tf32: let convolutions and matrix products round their inputs to TF32's 10 bits of mantissa. PyTorch's default
            allows it for convolutions, which makes results depend on the GPU.

    Raises:
        UserError: the device does not exist, or one GPU is named for several processes.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; give cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        device = _own_gpu(name, device)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    elif device.type != "cpu":
        raise UserError(f"--device {name} is not supported; give cpu, cuda or cuda:N")
    return device


def _own_gpu(name: str, device: torch.device) -> torch.device:
    """Return the GPU of this process, and make it the default device of kernel launches."""
    count, processes = torch.cuda.device_count(), _process_count()
    if (device.index or 0) >= count:
        raise UserError(f"--device {name} does not exist ({count} CUDA devices found); give --device cpu")
    if processes > 1:
        if device.index is not None:
            raise UserError(
                f"--device {name} names one GPU for the {processes} processes that torchrun started; give --device "
                "cuda, and each takes its own"
            )
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= count:
            raise UserError(
                f"torchrun started more processes on this machine than it has GPUs ({count}); give torchrun "
                f"--nproc_per_node {count}, or the command --device cpu"
            )
        device = torch.device("cuda", local)
    if device.index:
        torch.cuda.set_device(device)
    return device


def arithmetic_of(device: torch.device) -> dict[str, Any]:
    """Return the device settings that affect results beyond summation order: device type and TF32; none on the CPU."""
    return {} if device.type == "cpu" else {"device": device.type, "tf32": torch.backends.cudnn.allow_tf32}


def precision_on(device: torch.device, precision: str | None) -> str:
    """Return the dtype in which a device calls the network; ``--precision autocast`` halves on a GPU alone.

    Args:
        precision: as in `describe_gpu`.
    """
    halves = precision == "autocast" and device.type == "cuda"
    return str(torch.get_autocast_dtype("cuda") if halves else torch.float32).removeprefix("torch.")


def describe_gpu(device: torch.device, precision: str | None) -> dict[str, Any] | None:
    """Return the manifest's description of a GPU: ``name``, ``tf32`` and ``precision``; None on the CPU.

    Args:
        precision: ``--precision``; None if the script does not have it.
    """
    if device.type != "cuda":
        return None
    told = {"name": torch.cuda.get_device_name(device), "tf32": torch.backends.cudnn.allow_tf32}
    if precision is not None:
        told["precision"] = f"{precision} {precision_on(device, precision)}"
    return told


def _process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """One process, or several under torchrun, managed by Lightning Fabric.

    Attributes:
        rank, count: number of this process (from 0), and of processes.
        device: this process's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.count = device, 0, _process_count()
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
        """Wait until all processes have reached this call."""
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
