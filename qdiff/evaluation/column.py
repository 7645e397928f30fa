"""A result as shown in tables and plots: its name, which direction is better, and how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
"""One result: ``label``, numbers by key (a spread is ``<key>_std``), and ``published``, numbers of a paper by key."""

LOWER, HIGHER = "lower", "higher"
NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """One column of a table, and the axis of a plot.

    Attributes:
        key: key of the number in a row.
        title: the name in the heading.
        better: "lower" or "higher".
        write: turns the number into text.
        published: the column shows the paper's number instead of the measured one.
        spread: the row's ``<key>_std`` is the number's own spread, and is shown with it.
        share: the number is a share of images, at most 1, so its axis is in per cent.
        ranked: the best of several numbers is marked; False for what is a setting more than a quality.
    """

    key: str
    title: str
    better: str
    write: Callable[[float], str]
    published: bool = False
    spread: bool = False
    share: bool = False
    ranked: bool = True

    @property
    def heading(self) -> str:
        return f"{self.title} {'↓' if self.better == LOWER else '↑'}"

    def value(self, row: Row) -> float | None:
        """Return the number, for sorting and plots; None if the row does not have it."""
        return (row.get("published") or {} if self.published else row).get(self.key)

    def spread_in(self, row: Row) -> float:
        """Return the spread to show with the number; 0 if there is none, as for published numbers.

        In a row that stands for several seeds (``seeds``) every number has the spread over these.
        """
        shown = (self.spread or row.get("seeds")) and not self.published
        return row.get(f"{self.key}_std") or 0.0 if shown else 0.0

    def text(self, row: Row) -> str:
        """Return the text of the row's cell."""
        value, spread = self.value(row), self.spread_in(row)
        if value is None:
            return NOTHING
        return f"{self.write(value)} ± {self.write(spread)}" if spread else self.write(value)
