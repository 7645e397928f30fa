"""A number as tables and plots show it: its name, which way is better, and how it is written."""

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
        key: what a row calls the number.
        title: the name in the heading.
        better: "lower" or "higher".
        write: the number as text.
        published: the column shows what the paper reports, not what was measured.
        spread: the row's ``<key>_std`` is the number's own spread, and is shown with it.
        share: the number is a share of images, at most 1: its axis is in per cent.
    """

    key: str
    title: str
    better: str
    write: Callable[[float], str]
    published: bool = False
    spread: bool = False
    share: bool = False

    @property
    def heading(self) -> str:
        return f"{self.title} {'↓' if self.better == LOWER else '↑'}"

    def value(self, row: Row) -> float | None:
        """Return the number, for sorting and plots; None where the row has none."""
        return (row.get("published") or {} if self.published else row).get(self.key)

    def spread_in(self, row: Row) -> float:
        """Return the spread that is shown with the number; 0 where there is none, as of what a paper reports."""
        return row.get(f"{self.key}_std") or 0.0 if self.spread and not self.published else 0.0

    def text(self, row: Row) -> str:
        """Return what the cell shows."""
        value, spread = self.value(row), self.spread_in(row)
        if value is None:
            return NOTHING
        return f"{self.write(value)} ± {self.write(spread)}" if spread else self.write(value)
