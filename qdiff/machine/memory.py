"""How much memory is free, and how much this process holds, in bytes."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def resident_memory() -> int:
    """Return the RAM that this process holds now."""
    return _of_process("VmRSS")


def peak_resident_memory() -> int:
    """Return the most RAM that this process held, since `forget_peak` or since it began."""
    return _of_process("VmHWM")


def forget_peak() -> None:
    """Begin anew with `peak_resident_memory`, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_memory() -> int:
    """Return the RAM that is free now."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_on(device: torch.device) -> int:
    """Return a device's memory that is free now; on a GPU with what torch keeps for reuse."""
    if device.type != "cuda":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _of_process(field: str) -> int:
    if _STATUS.is_file():  # of this process alone: what getrusage says begins with the process that started it
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
