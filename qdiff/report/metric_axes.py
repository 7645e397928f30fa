"""The parts shared by all plots of a metric: its axis, the drawing of a row's number, and lines through rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from qdiff.evaluation.column import Column, Row
from qdiff.evaluation.registry import metric_columns
from qdiff.methods.registry import METHODS
from qdiff.report.columns import COSTS
from qdiff.report.figures import plain_log

_NAMES = {**{name: method.title for name, method in METHODS.items()}, "modiff": "MoDiff"}
FLOAT_COLOUR = "#555555"
FULL_BITS = 32
DECADE = 10  # values that span more get a logarithmic axis
_MARGIN = 0.12  # share of the values' span, on both sides, as room for a label


@dataclass(frozen=True)
class Series:
    """The rows connected by one line, for instance those of one method with or without split quantization.

    Attributes:
        name: name in the legend.
        colour, marker, dashes: matplotlib values.
        rows: indices of the rows in the table.
    """

    name: str
    colour: str
    marker: str
    dashes: str | tuple[float, tuple[float, ...]]
    rows: tuple[int, ...]

    @property
    def look(self) -> dict[str, Any]:
        """Return the keyword arguments for matplotlib's `plot`."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.dashes,
            "markeredgecolor": "white",
            "markeredgewidth": 0.6,
        }


def plotted() -> list[Column]:
    """Return the columns that get an axis: every metric, and the error of ε."""
    return [*metric_columns(), *(column for column in COSTS if column.key == "noise_mse")]


def is_float(row: Row) -> bool:
    """Whether the row's network is entirely float."""
    return row["method"] == "float"


def bits(row: Row) -> tuple[int, int]:
    """Return the bits of weights and activations, for sorting; 32 is float."""
    return row["weight_bits"] or FULL_BITS, row["act_bits"] or FULL_BITS


def width(row: Row) -> str:
    """Return the width in the papers' notation, for instance W4A8."""
    return "W{}A{}".format(*bits(row))


def method_name(row: Row) -> str:
    """Return the method's name as in its paper; modulation on top of another method is "linear + MoDiff"."""
    return " + ".join(_NAMES.get(part, part) for part in row["method"].split("+"))


def number(column: Column, row: Row) -> float | None:
    """Return the row's number in a column; None if it has none or the number is NaN."""
    value = column.value(row)
    return None if value is None or math.isnan(value) else value


def drawn(column: Column, row: Row) -> float | None:
    """Return the number if it can be plotted, else None (PSNR of equal images is infinite)."""
    value = number(column, row)
    return None if value is None or math.isinf(value) else value


def published(column: Column) -> Column:
    """Return the column of the papers' numbers for the same metric."""
    return replace(column, published=True)


def draw_series(
    axis: Any, column: Column, rows: Sequence[Row], series: Series, places: Mapping[int, float], key: str
) -> dict[str, str]:
    """Draw a series' points, hollow ones for a paper's numbers, and the line through the measured ones.

    Args:
        column: the metric.
        rows: rows of the table.
        places: x of every row of the series, by row index.
        key: id of the line.

    Returns:
        The titles of the drawn elements, by id.
    """
    titles: dict[str, str] = {}
    best: dict[float, float] = {}  # the line connects the best rows of each width
    for i in series.rows:
        for source in (published(column), column):
            value = drawn(source, rows[i])
            if value is None:
                continue
            point = f"{'paper' if source.published else 'point'}-{i}"
            titles[point] = title_of(source, rows[i])
            hollow = {"markerfacecolor": "white", "markeredgecolor": series.colour, "markeredgewidth": 1.2}
            look = {**series.look, **(hollow if source.published else {}), "linestyle": ""}
            axis.plot([places[i]], [value], markersize=6.5, zorder=3, gid=point, **look)
            if source is column:
                ends = [value + side * column.spread_in(rows[i]) for side in (-1, 1)]
                axis.vlines(places[i], *ends, color=series.colour, linewidth=1, alpha=0.5, zorder=1.5)
                pick = min if column.better == "lower" else max
                best[places[i]] = pick(best.get(places[i], value), value)
    if best:
        titles[key] = series.name
        line = {**series.look, "marker": ""}
        axis.plot(sorted(best), [best[x] for x in sorted(best)], linewidth=1.4, zorder=2, gid=key, **line)
    return titles


def title_of(column: Column, row: Row) -> str:
    """Return the tooltip of a point."""
    return f"{row['label']}: {column.title} {column.text(row)}{' as published' if column.published else ''}"


def metric_figure(column: Column, rows: Sequence[Row], size: tuple[float, float]) -> tuple[Figure, Any, dict[str, str]]:
    """Return a figure with the metric's axis (the same for all cost axes) and the line of float.

    Args:
        size: width and height in inches.

    Returns:
        The figure, its axes, and the titles of the float lines by id.
    """
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_ylabel(column.heading)
    paper = published(column)
    values = [v for row in rows for v in (drawn(column, row), drawn(paper, row)) if v is not None]
    values += [
        drawn(column, row) + side * column.spread_in(row)
        for row in rows
        if drawn(column, row) is not None
        for side in (-1, 1)
    ]
    low, high = min(values), max(values)
    if low > 0 and high > DECADE * low:
        axis.set_yscale("log")
        plain_log(axis.yaxis)
        margin = (high / low) ** _MARGIN
        axis.set_ylim(low / margin, high * margin)
    else:
        margin = _MARGIN * (high - low) or 0.1 * abs(high) or 1
        # A share above 1 makes no sense, so the axis ends just above it.
        axis.set_ylim(low - margin, min(high + margin, 1.01) if column.share else high + margin)
        axis.locator_params(axis="y", nbins=6)
        if column.share:
            axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        else:
            axis.ticklabel_format(axis="y", useOffset=False)
    titles: dict[str, str] = {}
    for i, row in enumerate(rows):
        for source, dashes in ((column, (5, 2)), (paper, (1, 2))):
            if is_float(row) and drawn(source, row) is not None:
                key = f"{'paper' if source.published else 'float'}-{i}"
                titles[key] = title_of(source, row)
                axis.axhline(drawn(source, row), color=FLOAT_COLOUR, linestyle=(0, dashes), linewidth=1.1, gid=key)
    return figure, axis, titles
