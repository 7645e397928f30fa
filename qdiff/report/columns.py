"""The columns of a table of results: the name of each, which direction is better, and the number format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, Any]
"""One result: ``label``, numbers by key (a spread is ``<key>_std``), and ``published``, a paper's numbers by key."""

LOWER, HIGHER = "lower", "higher"
NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: the number's key in a row.
        title: the name in the heading.
        better: "lower" or "higher".
        write: formats the number.
        published: whether the column shows the paper's number instead of the measured one.
    """

    key: str
    title: str
    better: str
    write: Callable[[float], str]
    published: bool = False

    @property
    def heading(self) -> str:
        return f"{self.title} {'↓' if self.better == LOWER else '↑'}"

    def value(self, row: Row) -> float | None:
        """Return the number, for sorting and plots; None if the row has none."""
        return (row.get("published") or {} if self.published else row).get(self.key)

    def text(self, row: Row) -> str:
        """Return the text of the cell."""
        value, spread = self.value(row), row.get(f"{self.key}_std")
        if value is None:
            return NOTHING
        shown = self.write(value)
        # Only IS shows its spread: KID's is over its subsets and would be mistaken for the spread of its mean.
        return f"{shown} ± {self.write(spread)}" if self.key == "isc" and spread and not self.published else shown


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds else NOTHING


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f} M"


METRICS = (
    Column("fid", "FID", LOWER, "{:.2f}".format),
    Column("sfid", "sFID", LOWER, "{:.2f}".format),
    Column("isc", "IS", HIGHER, "{:.2f}".format),
    Column("kid", "KID", LOWER, "{:.4f}".format),
    Column("precision", "precision", HIGHER, "{:.3f}".format),
    Column("recall", "recall", HIGHER, "{:.3f}".format),
    Column("clip_score", "CLIP", HIGHER, "{:.2f}".format),
    Column("asked_share", "asked", HIGHER, lambda share: f"{100 * share:.1f} %"),
    Column("psnr", "PSNR", HIGHER, "{:.1f} dB".format),
    Column("ssim", "SSIM", HIGHER, "{:.3f}".format),
    Column("lpips", "LPIPS", LOWER, "{:.3f}".format),
)
COSTS = (
    Column("noise_mse", "ε error", LOWER, "{:.2e}".format),
    Column("bytes", "file", LOWER, _megabytes),
    Column("counted_bytes", "counted", LOWER, _megabytes),
    Column("gbops", "GBops", LOWER, "{:,.1f}".format),
    Column("state_bytes", "state", LOWER, _megabytes),  # per image
    Column("additions", "additions", LOWER, _millions),  # per image and step
    Column("calibration_s", "calibration", LOWER, _seconds),
    Column("sampling_s", "sampling", LOWER, _seconds),
)


def columns_of(rows: list[Row]) -> list[Column]:
    """Return the columns that at least one row has a number for; a published number follows the measured one."""
    columns: list[Column] = []
    for metric in METRICS:
        columns += [metric, replace(metric, title=f"{metric.title} (paper)", published=True)]
    return [column for column in (*columns, *COSTS) if any(column.text(row) != NOTHING for row in rows)]


def markdown(rows: list[Row], header: bool = True) -> str:
    """Return rows as a markdown table, with or without its header."""
    columns = columns_of(rows)
    lines = [[row["label"], *(column.text(row) for column in columns)] for row in rows]
    if header:
        lines = [["", *(column.heading for column in columns)], ["---"] * (1 + len(columns)), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
