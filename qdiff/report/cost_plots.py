"""Plots of a metric against what a row costs: the size of its file, and the time of its calibration.

Colour is the method and shape the width. A row of several seeds is at its means, with bars of one standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qdiff.evaluation.column import LOWER, Column, Row
from qdiff.report.figures import plain_log, svg, write_labels
from qdiff.report.metric_axes import (
    DECADE,
    FLOAT_COLOUR,
    Series,
    bits,
    drawn,
    is_float,
    metric_figure,
    title_of,
    width,
)

_SIZE = (4.8, 2.9)  # inches
_SHAPES = ("o", "^", "s", "D", "v", "P", "X", "p", "<", ">", "h", "d")
_OUTLINE = {"markeredgecolor": "white", "markeredgewidth": 0.6}


@dataclass(frozen=True)
class Cost:
    """The horizontal axis of a plot.

    Attributes:
        key: of the number in a row.
        name: in the plot's name.
        label: of the axis.
        unit: in tooltips.
        scale: a row's number is divided by it.
        digits: number format of tooltips.
    """

    key: str
    name: str
    label: str
    unit: str
    scale: float = 1.0
    digits: str = ".2f"

    def value(self, row: Row) -> float | None:
        """Return the row's place; None if the row has no cost of this kind."""
        return row[self.key] / self.scale if row.get(self.key) else None

    def spread(self, row: Row) -> float:
        """Return the deviation over the row's seeds."""
        return (row.get(f"{self.key}_std") or 0.0) / self.scale if row.get("seeds") else 0.0


SIZE = Cost("bytes", "size", "size of the file in MB", "MB", 1e6)
TIME = Cost("calibration_cpu_s", "time", "CPU seconds of the calibration", "CPU s", digits=",.1f")


def shapes(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Return how each width of the quantized rows is drawn, the widest first: matplotlib's keyword arguments."""
    widths = dict.fromkeys(width(row) for row in sorted(rows, key=bits, reverse=True) if not is_float(row))
    return {name: {"marker": _SHAPES[i % len(_SHAPES)], **_OUTLINE} for i, name in enumerate(widths)}


def cost_plot(
    column: Column, cost: Cost, rows: Sequence[Row], series: Sequence[Series], looks: dict[str, dict[str, Any]]
) -> str | None:
    """Return the plot as SVG; None if no quantized row has both numbers.

    The rows that no other row beats in both numbers are labelled; the others say what they are when pointed at.

    Args:
        column: the metric.
        cost: the horizontal axis.
        rows: rows of the table.
        series: which rows have which colour.
        looks: from `shapes`.
    """
    placed = {
        i: (cost.value(row), drawn(column, row))
        for i, row in enumerate(rows)
        if cost.value(row) is not None and drawn(column, row) is not None
    }
    if all(is_float(rows[i]) for i in placed):
        return None
    figure, axis, titles = metric_figure(column, rows, _SIZE)
    _set_costs(axis, cost, [rows[i] for i in placed])
    colours = {i: one.colour for one in series for i in one.rows}
    for i, (x, y) in placed.items():
        row = rows[i]
        titles[f"point-{i}"] = f"{title_of(column, row)}, {x:{cost.digits}} {cost.unit}"
        if is_float(row):
            look = {"color": FLOAT_COLOUR, "marker": "*", "markersize": 9, **_OUTLINE}
        else:
            look = {"color": colours[i], "markersize": 6.5, **looks[width(row)]}
        axis.plot([x], [y], zorder=3, gid=f"point-{i}", linestyle="", **look)
        across, up = cost.spread(row), column.spread_in(row)
        bar = {"color": look["color"], "linewidth": 1, "alpha": 0.5, "zorder": 1.5}
        if across:
            axis.hlines(y, max(x - across, axis.get_xlim()[0]), x + across, **bar)
        if up:
            axis.vlines(x, y - up, y + up, **bar)
    axis.set_xlabel(cost.label)
    labelled = _unbeaten(column, {i: place for i, place in placed.items() if not is_float(rows[i])})
    names = {i: "float" if is_float(rows[i]) else rows[i]["label"] if i in labelled else "" for i in placed}
    write_labels(figure, axis, [(x, y, names[i]) for i, (x, y) in placed.items()], [*dict.fromkeys(names.values())])
    return svg(figure, f"{column.key}-{cost.name}", f"{column.title} against {cost.name}", titles)


def _set_costs(axis: Any, cost: Cost, rows: Sequence[Row]) -> None:
    values = [cost.value(row) for row in rows]
    ends = [cost.value(row) + side * cost.spread(row) for row in rows for side in (-1, 1)]
    if max(values) > DECADE * min(values):
        axis.set_xscale("log")
        plain_log(axis.xaxis)
        # A bar that reaches 0 ends at the axis.
        axis.set_xlim(min(values) / 1.5, max(ends) * 1.5)
    else:
        axis.set_xlim(0, 1.12 * max(ends))


def _unbeaten(column: Column, places: dict[int, tuple[float, float]]) -> set[int]:
    """Return the rows that cost less than every row that is as good."""
    sign = 1 if column.better == LOWER else -1
    return {
        i
        for i, (x, y) in places.items()
        if not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b in places.values())
    }
