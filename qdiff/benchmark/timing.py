"""Turns in alternation, and what their seconds say."""

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
        """Return that of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    @classmethod
    def of_ratio(cls, base: Sequence[float], own: Sequence[float]) -> Spread:
        """Return that of base / own turn by turn: above 1 is faster than the base."""
        return cls.of([b / o for b, o in zip(base, own, strict=True)])


@dataclass(frozen=True)
class Turns:
    """All turns of a variant.

    Attributes:
        seconds: one a turn.
        calls: of the network in every turn.
    """

    seconds: list[float]
    calls: int


def alternated(turns: dict[str, Turn], repeats: int) -> tuple[dict[str, Turns], dict[str, str]]:
    """Let variants take turns (A B C A B C …): whatever else the machine does meets them all alike.

    Args:
        turns: by variant; each returns the seconds it took and the network calls in it.

    Returns:
        The turns of each, and why others fell out.
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
