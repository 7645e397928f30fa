"""What a virtual device counts: waits of the host, transfers and kernels, each with the line of code that asked."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from pathlib import Path
from types import FrameType

REPOSITORY = str(Path(__file__).parents[2])
_OWN = str(Path(__file__).parent)


class Direction(str, Enum):
    """Which way a transfer goes."""

    H2D = "H2D"  # host to device
    D2H = "D2H"
    D2D = "D2D"  # between two devices


@dataclass(frozen=True)
class Frame:
    """A line of the project that was being executed."""

    file: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.function})"


@dataclass(frozen=True)
class Wait:
    """The host waits for the device here.

    Attributes:
        kind: what makes it wait, e.g. "item".
        stack: lines of the project, innermost first.
    """

    kind: str
    stack: tuple[Frame, ...]

    def inside(self, *places: str) -> bool:
        """Whether a frame's ``file`` or ``file:function`` starts with one of ``places``."""
        return any(f"{frame.file}:{frame.function}".startswith(places) for frame in self.stack)

    def __str__(self) -> str:
        return f"{self.kind} at {' < '.join(map(str, self.stack[:4])) or 'no line of the project'}"


@dataclass(frozen=True)
class Transfer:
    """Bytes that go from one memory to another.

    Attributes:
        pinned: the host's side is pinned memory.
        waits: the host waits for it: all but copies from or to pinned memory with ``non_blocking``.
    """

    direction: Direction
    pinned: bool
    waits: bool
    bytes: int
    stack: tuple[Frame, ...]

    inside = Wait.inside

    def __str__(self) -> str:
        memory = "pinned" if self.pinned else "pageable"
        where = " < ".join(map(str, self.stack[:4])) or "no line of the project"
        return f"{self.direction.value} of {self.bytes} bytes, {memory}{', waits' if self.waits else ''}, at {where}"


@dataclass
class Counts:
    """Everything counted while it was open.

    Attributes:
        waits: of the host; transfers that wait are among them.
        kernels: launches by the innermost line of the project.
        operations: launches by the operation's name.
    """

    waits: list[Wait] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    kernels: Counter[Frame | None] = field(default_factory=Counter)
    operations: Counter[str] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        """How many kernels were launched."""
        return self.operations.total()

    def waits_inside(self, *places: str, but: tuple[str, ...] = ()) -> list[str]:
        """Return the waits with a line of ``places`` on their stack and none of ``but``, as text."""
        return [str(w) for w in self.waits if w.inside(*places) and not (but and w.inside(*but))]

    def pageable(self, *places: str) -> list[str]:
        """Return the transfers from or to pageable memory with a line of ``places`` on their stack, as text."""
        return [str(t) for t in self.transfers if not t.pinned and (not places or t.inside(*places))]

    def bytes_moved(self, direction: Direction) -> int:
        """Return the bytes of all transfers in a direction."""
        return sum(t.bytes for t in self.transfers if t.direction is direction)


class Recorder:
    """Passes what happens on to all `Counts` that are open."""

    def __init__(self) -> None:
        self._open: list[Counts] = []

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counts]:
        """Yield counts of what happens inside the block; blocks may be nested."""
        counts = Counts()
        self._open.append(counts)
        try:
            yield counts
        finally:
            self._open = [c for c in self._open if c is not counts]

    def wait(self, kind: str) -> None:
        """The host waits."""
        if self._open:
            event = Wait(kind, stack())
            for counts in self._open:
                counts.waits.append(event)

    def transfer(self, direction: Direction, pinned: bool, waits: bool, size: int) -> None:
        """Bytes move."""
        if not self._open:
            return
        where = stack()
        for counts in self._open:
            counts.transfers.append(Transfer(direction, pinned, waits, size, where))
            if waits:
                counts.waits.append(Wait(f"{direction.value} copy", where))

    def kernel(self, operation: str) -> None:
        """A kernel is launched."""
        if self._open:
            where = next(_frames(), None)
            for counts in self._open:
                counts.kernels[where] += 1
                counts.operations[operation] += 1


def stack() -> tuple[Frame, ...]:
    """Return the lines of the project that are being executed, innermost first."""
    return tuple(_frames())


def _frames() -> Iterator[Frame]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = _file_of_the_project(frame.f_code.co_filename)
        if file is not None:
            yield Frame(file, frame.f_code.co_name, frame.f_lineno)
        frame = frame.f_back


@cache
def _file_of_the_project(name: str) -> str | None:
    """Return a source file's path inside the repository, or None where it is not of the project."""
    if name.startswith(REPOSITORY) and not name.startswith(_OWN) and "/.venv/" not in name:
        return name[len(REPOSITORY) + 1 :]
    return None
