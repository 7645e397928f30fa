"""The library that lets backward passes run on the virtual device: built with a C++ compiler, loaded before torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("no_accelerator.cpp")


def compiler() -> str | None:
    """Return a C++ compiler of this machine, or None."""
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def build_preload(folder: Path) -> dict[str, str]:
    """Build the library into a folder, and return the environment of a process that loads it."""
    library = folder / "no_accelerator.so"
    command = [compiler(), "-shared", "-fPIC", "-std=c++17", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
