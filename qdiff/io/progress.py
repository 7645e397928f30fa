"""Progress on stderr: a bar in a terminal, or a plain line from time to time in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol, TextIO, TypeVar

from tqdm import tqdm

INTERVAL = 30.0
"""Minimum seconds between two lines."""

Item = TypeVar("Item")


class Progress(Protocol):
    """The part of `tqdm`'s interface that loops use.

    Attributes:
        n: how much is done.
        total: how much there is to do; None if unknown.
    """

    n: float
    total: float | None

    def __enter__(self) -> Progress: ...

    def __exit__(self, *error: Any) -> None: ...

    def update(self, n: float = 1) -> Any: ...

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None: ...

    def close(self) -> None: ...


def progress_bar(
    total: float | None = None,
    desc: str = "",
    unit: str = "it",
    initial: float = 0,
    unit_scale: bool = False,
    disable: bool = False,
) -> Progress:
    """Return a context manager that shows the progress of a loop on stderr.

    Args:
        total: how much there is to do.
        desc: description of the work.
        unit: unit of ``total``.
        initial: how much was done before.
        unit_scale: shorten numbers, e.g. 1.2M.
        disable: show nothing.
    """
    if disable or sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, initial=initial, unit_scale=unit_scale, disable=disable)
    return Lines(total, desc, unit, initial, unit_scale, sys.stderr)


def tracked(items: Collection[Item], desc: str, unit: str = "it", disable: bool = False) -> Iterator[Item]:
    """Yield ``items`` and show how many are done."""
    with progress_bar(len(items), desc, unit, disable=disable) as bar:
        for item in items:
            yield item
            bar.update()


class Lines:
    """Writes a line whenever ``INTERVAL`` seconds have passed since the last one, and one at the end.

    Args:
        total, desc, unit, initial, unit_scale: see `progress_bar`.
        file: where lines are written.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        total: float | None,
        desc: str,
        unit: str,
        initial: float,
        unit_scale: bool,
        file: TextIO,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.n = total, initial
        self._desc, self._unit, self._scaled = desc, unit, unit_scale
        self._file, self._clock, self._note, self._closed = file, clock, "", False
        self._started = self._last = clock()
        self._n_last = initial  # at the last line

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._end(stopped=kind is not None)

    def update(self, n: float = 1) -> None:
        """Count ``n`` more as done."""
        self.n += n
        now = self._clock()
        if now - self._last >= INTERVAL:
            self._write(", ".join(part for part in (self._share(), self._time_left(now), self._note) if part))
            self._last, self._n_last = now, self.n

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Show ``s`` at the end of the next lines."""
        self._note = s

    def close(self) -> None:
        """Write the last line."""
        self._end(stopped=False)

    def _end(self, stopped: bool) -> None:
        if self._closed:
            return
        self._closed = True
        took = duration(self._clock() - self._started)
        self._write(f"{self._share()}, {'stopped after' if stopped else 'took'} {took}")

    def _write(self, text: str) -> None:
        self._file.write(f"{self._desc}: {text}\n")
        self._file.flush()

    def _share(self) -> str:
        if not self.total:
            return self._number(self.n) + self._shown_unit
        # Rounded down, so 100 % means that all is done; the 1e-6 absorbs the rounding of parts of a unit.
        share = int(100 * self.n / self.total + 1e-6)
        return f"{share} % ({self._number(self.n)} of {self._number(self.total)}{self._shown_unit})"

    @property
    def _shown_unit(self) -> str:
        return self._unit if self._scaled else f" {self._unit}"

    def _time_left(self, now: float) -> str:
        """The time left at the speed since the last line; work done by an earlier run does not count."""
        done = self.n - self._n_last
        if not self.total or done <= 0:
            return ""
        return f"{duration((self.total - self.n) * (now - self._last) / done)} left"

    def _number(self, value: float) -> str:
        return tqdm.format_sizeof(value) if self._scaled else str(round(value))


def duration(seconds: float) -> str:
    """Return a duration in words, e.g. "5 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
