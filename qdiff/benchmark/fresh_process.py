"""What tasks take of the machine's memory, measured in a fresh process: nothing of before is in the way."""

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
        before: when the task began.
        after: when the task was done, with what it returned still alive.
        peak: the most since the task began; on systems that cannot tell since the process began.
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


class FreshProcess:
    """A process that runs tasks one after the other, from its first task to `close` or the end of the block.

    Tasks are functions of a module's top level; they and their arguments can be pickled.
    """

    def __init__(self) -> None:
        # Not a Pool: that waits for ever for a worker that was killed, and lets none start processes of its own.
        self._executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._executor.shutdown()

    def run(self, task: Callable[..., Any], *args: Any) -> Any:
        """Return what a task returns there, or raise what it raises.

        Raises:
            UserError: the process was killed meanwhile.
        """
        try:
            return self._executor.submit(task, *args).result()
        except BrokenProcessPool:
            raise UserError(
                f"the process of {task.__name__.strip('_')} was killed, most likely for want of memory; free some, or "
                "ask for less"
            ) from None

    def measured(self, task: Callable[..., Any], *args: Any) -> ProcessMemory:
        """Run a task and return what it took; what it returned is kept there for `on_kept`."""
        return self.run(_measure, task, args)

    def on_kept(self, task: Callable[..., Any], *args: Any) -> Any:
        """Run a task on what the one measured last returned, ``task(kept, *args)``."""
        return self.run(_on_kept, task, args)


_kept: Any = None
"""In the fresh process: what the task measured last returned."""


def _measure(task: Callable[..., Any], args: tuple[Any, ...]) -> ProcessMemory:
    global _kept
    forget_peak()  # e.g. of imports
    before = resident_memory()
    _kept = task(*args)
    return ProcessMemory(before, resident_memory(), peak_resident_memory())


def _on_kept(task: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return task(_kept, *args)
