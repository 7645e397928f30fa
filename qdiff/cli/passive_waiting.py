"""Importing this, before torch loads, makes idle OpenMP threads sleep instead of spin.

A thread that has done its share of a parallel region spins in wait for the next one. Where another process needs the
core, the thread that others wait for is not running: two calibrations side by side then take many times as long as one.
OpenMP runtimes read the environment when they are loaded, so this must come before torch, and child processes inherit
it. Whoever has set any of the variables keeps the choice.
"""

from __future__ import annotations

import os

# The standard's variable; GNU's libgomp and LLVM's or Intel's libomp each have one of their own beside it.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}

if not any(name in os.environ for name in PASSIVE):
    os.environ.update(PASSIVE)
