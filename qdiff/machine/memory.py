"""Free memory of the machine and memory use of this process, in bytes."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from pathlib import Path

import psutil
import torch

from qdiff.machine.control_groups import memory_within_limits

_STATUS = Path("/proc/self/status")


def resident_memory() -> int:
    """Return the RAM that this process uses now."""
    return _of_process("VmRSS")


def peak_resident_memory() -> int:
    """Return the peak RAM of this process since `forget_peak`, or since it started."""
    return _of_process("VmHWM")


def forget_peak() -> None:
    """Reset `peak_resident_memory`, if the system supports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def return_freed_memory() -> None:
    """Give memory that was freed back to the system.

    The C library keeps freed blocks for reuse; while many large weights are replaced by small ones, these add up. Where
    it is not glibc, nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def available_memory() -> int:
    """Return the RAM that can be taken now.

    Page cache that the system gives up on demand counts as available; what a container or a batch job may not take does
    not.
    """
    return int(min(psutil.virtual_memory().available, memory_within_limits()))


def available_on(device: torch.device) -> int:
    """Return a device's memory that is free now; on a GPU, this includes memory that torch keeps for reuse."""
    if device.type != "cuda":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _of_process(field: str) -> int:
    if _STATUS.is_file():  # preferred: getrusage starts with the peak of the parent process
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
