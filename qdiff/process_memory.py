"""What a task takes of the machine's memory, measured in a fresh process: nothing of before is in the way."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ProcessMemory:
    """Resident memory of a process in bytes.

    Attributes:
        before: when the preparation was done.
        after: when the task was done, with what it returned still alive.
        peak: the most at any time.
    """

    before: int
    after: int
    peak: int

    @property
    def kept(self) -> int:
        """What the task left behind."""
        return self.after - self.before

    @property
    def taken(self) -> int:
        """What the task took at most."""
        return self.peak - self.before


def measured(task: Callable[..., Any], *args: Any, prepare: Callable[[], Any] | None = None) -> ProcessMemory:
    """Run a task in a fresh process and return what it took.

    Args:
        task: a function of a module's top level; what it returns is kept until the end of the measurement.
        args: can be pickled.
        prepare: likewise; called before, and not measured. Imports belong there.

    Raises:
        Whatever the task raises.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (task, args, prepare))


def _measure(task: Callable[..., Any], args: tuple[Any, ...], prepare: Callable[[], Any] | None) -> ProcessMemory:
    if prepare is not None:
        prepare()
    before = _resident("VmRSS")
    kept = task(*args)
    use = ProcessMemory(before, _resident("VmRSS"), _resident("VmHWM"))
    del kept
    return use


def _resident(field: str) -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # of this process alone: what getrusage says begins with the process that started it
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
