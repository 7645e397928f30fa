"""Measure the memory use of tasks in a fresh process, where earlier work has no effect."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from qdiff.errors import UserError
from qdiff.machine.memory import forget_peak, peak_resident_memory, resident_memory


@dataclass(frozen=True)
class ProcessMemory:
    """Resident memory of a process in bytes.

    Attributes:
        before: when the task started.
        after: when the task was done, with its result still alive.
        peak: the peak since the task started; on systems that cannot tell, since the process started.
    """

    before: int
    after: int
    peak: int

    @property
    def kept(self) -> int:
        """Memory that the task's result keeps in use."""
        return self.after - self.before

    @property
    def taken(self) -> int:
        """Peak memory of the task."""
        return self.peak - self.before


class FreshProcess:
    """A process that runs tasks one after another, from its first task to `close` or the end of the block.

    Tasks are functions at the top level of a module; they and their arguments must be picklable.
    """

    def __init__(self) -> None:
        # Not a Pool, which waits forever for a killed worker and does not let workers start processes.
        self._executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._executor.shutdown()

    def run(self, task: Callable[..., Any], *args: Any) -> Any:
        """Run a task in the process; return its result, or raise its exception.

        Raises:
            UserError: the process was killed during the task.
        """
        try:
            return self._executor.submit(task, *args).result()
        except BrokenProcessPool:
            raise UserError(
                f"the process of {task.__name__.strip('_')} was killed, most likely because memory ran out; free some, "
                "or choose smaller sizes"
            ) from None

    def measured(self, task: Callable[..., Any], *args: Any) -> ProcessMemory:
        """Run a task and return its memory use; its result is kept in the process for `on_kept`."""
        return self.run(_measure, task, args)

    def on_kept(self, task: Callable[..., Any], *args: Any) -> Any:
        """Run a task on the result of the last measured task, ``task(kept, *args)``."""
        return self.run(_on_kept, task, args)


_kept: Any = None
"""In the fresh process: the result of the last measured task."""


def _measure(task: Callable[..., Any], args: tuple[Any, ...]) -> ProcessMemory:
    global _kept
    forget_peak()  # e.g. of imports
    before = resident_memory()
    _kept = task(*args)
    return ProcessMemory(before, resident_memory(), peak_resident_memory())


def _on_kept(task: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return task(_kept, *args)
