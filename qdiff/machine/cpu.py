"""The CPU: its name, its instruction sets, and those that PyTorch uses."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import torch


def cpu_name_and_flags() -> tuple[str, set[str]]:
    """Return the CPU's name and its instruction sets as Linux reports them; no instruction sets on other systems."""
    name, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())
    return name, flags


def cpu_text() -> str:
    """Return the CPU's name and the instruction set of PyTorch's kernels, such as ``AMD EPYC, AVX2``.

    The set is that of ``ATEN_CPU_CAPABILITY`` where this is set, so it may be smaller than what the CPU has.
    """
    return f"{cpu_name_and_flags()[0]}, {torch.backends.cpu.get_cpu_capability()}"
