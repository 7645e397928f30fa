"""Describe the machine of a benchmark."""

from __future__ import annotations

import os
from typing import Any

from qdiff.cli.run_folder import installed_versions
from qdiff.machine.cpu import cpu_name_and_flags

# CPU flags that decide which float and integer kernels are used.
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PACKAGES = ("torch", "onnx", "onnxruntime", "openvino")


def describe_machine(threads: int) -> dict[str, Any]:
    """Return CPU, its flags, cores, memory, present load, threads and package versions."""
    name, flags = cpu_name_and_flags()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": name,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": round(os.getloadavg()[0], 2),
        "threads": threads,
        "packages": installed_versions(PACKAGES),
    }


def machine_text(machine: dict[str, Any]) -> str:
    """Return the description of a machine in one line."""
    cores = f"{machine['cores']} cores"
    if machine["usable_cores"] != machine["cores"]:
        cores += f", of which {machine['usable_cores']} may be used"
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    return (
        f"{machine['cpu']} ({' '.join(machine['flags']) or 'no vector flags known'}), {cores}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['threads']} thread(s), load {machine['load']} before; "
        f"{versions}"
    )
