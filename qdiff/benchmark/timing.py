"""Run variants in alternating turns, and summarize their times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qdiff.errors import UserError

Turn = Callable[[], tuple[float, int]]


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the median and quartiles of one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    @classmethod
    def of_ratio(cls, base: Sequence[float], own: Sequence[float]) -> Spread:
        """Return the median and quartiles of base / own, turn by turn; above 1 is faster than the base."""
        return cls.of([b / o for b, o in zip(base, own, strict=True)])


@dataclass(frozen=True)
class Turns:
    """All turns of a variant.

    Attributes:
        seconds: seconds of every turn.
        calls: network calls per turn.
    """

    seconds: list[float]
    calls: int


def alternated(turns: dict[str, Turn], repeats: int) -> tuple[dict[str, Turns], dict[str, str]]:
    """Run variants in turns (A B C A B C …), so that other load of the machine affects all of them alike.

    Args:
        turns: one function per variant, which runs a turn and returns its seconds and its network calls.

    Returns:
        The turns of each variant, and the errors of variants that failed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    calls, failures = {}, {}
    for _ in range(repeats):
        for name in list(seconds):
            try:
                taken, calls[name] = turns[name]()
            except UserError as error:
                failures[name] = str(error)
                del seconds[name]
            else:
                seconds[name].append(taken)
    return {name: Turns(taken, calls[name]) for name, taken in seconds.items() if taken}, failures
