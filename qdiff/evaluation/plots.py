"""Plots of results as SVG for a web page: a metric against bits, and against the size of the file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from qdiff.evaluation.columns import COSTS, METRICS, Column, Row
from qdiff.evaluation.figures import our_style, plain_log, svg, write_labels

# Okabe and Ito's colours: told apart with any colour vision, and by marker in print.
NAMES = {"float": "float", "linear": "linear", "qdiff": "Q-Diffusion", "eda_dm": "EDA-DM", "modiff": "MoDiff"}
_STYLES = {
    "linear": ("#D55E00", "s"),
    "qdiff": ("#0072B2", "o"),
    "eda_dm": ("#009E73", "^"),
    "modiff": ("#CC79A7", "D"),
}
_OTHER_STYLES = (("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
_FLOAT_COLOUR = "#555555"
_FULL_BITS = 32
_SIZE = (4.8, 2.9)  # inches
_DECADE = 10
_MARGIN = 0.12  # of the values' span, on both sides: room for a label
_DODGE = 0.09  # of the distance between two widths, so that equal results of two methods are both seen
_BYTES_A_MB = 1e6
_PLOTTED = (*METRICS, *(column for column in COSTS if column.key == "noise_mse"))


@dataclass(frozen=True)
class Series:
    """The rows of one method, with one choice of split quantization."""

    name: str
    colour: str
    marker: str
    split: bool
    rows: tuple[int, ...]


@dataclass(frozen=True)
class MetricPlots:
    """The plots of one metric as SVG.

    Attributes:
        column: the metric.
        spread: the plot against bits has bars of a standard deviation.
        against_bits: the plot against bits.
        against_size: the plot against the file's size; None where no measured row has a size.
    """

    column: Column
    spread: bool
    against_bits: str
    against_size: str | None


def is_float(row: Row) -> bool:
    """Whether nothing of the row's network is quantized."""
    return row["method"] == "float"


def bits(row: Row) -> tuple[int, int]:
    """Return the bits of weights and activations, for sorting; 32 is float."""
    return row["weight_bits"] or _FULL_BITS, row["act_bits"] or _FULL_BITS


def width(row: Row) -> str:
    """Return the papers' name of a width, for instance W4A8."""
    return "W{}A{}".format(*bits(row))


def method_name(row: Row) -> str:
    """Return the method as its paper writes it."""
    return NAMES.get(row["method"], row["method"])


def number(column: Column, row: Row) -> float | None:
    """Return the row's number in a column; None where it has none or it is not a number."""
    value = column.value(row)
    return None if value is None or math.isnan(value) else value


def series_of(rows: Sequence[Row]) -> list[Series]:
    """Return the quantized rows by method; a method's colour and marker do not depend on which others are there."""
    members: dict[tuple[str, bool], list[int]] = {}
    for i, row in enumerate(rows):
        if not is_float(row):
            members.setdefault((row["method"], bool(row.get("split"))), []).append(i)
    others = [method for method in dict.fromkeys(method for method, _ in members) if method not in _STYLES]
    styles = {**_STYLES, **{m: _OTHER_STYLES[i % len(_OTHER_STYLES)] for i, m in enumerate(others)}}
    return [
        Series(NAMES.get(method, method) + (", split" if split else ""), *styles[method], split, tuple(indices))
        for (method, split), indices in members.items()
    ]


def metric_plots(rows: Sequence[Row]) -> list[MetricPlots]:
    """Return the plots of every metric that a quantized row has a number for."""
    quantized = [row for row in rows if not is_float(row)]
    plots = []
    with our_style():
        for column in _PLOTTED:
            measured = [row for row in quantized if _drawn(column, row) is not None]
            if measured:
                spread = any(_spread(column, row) for row in measured)
                sized = any(row.get("bytes") for row in measured)
                against_size = _against_size(column, rows) if sized else None
                plots.append(MetricPlots(column, spread, _against_bits(column, rows), against_size))
    return plots


def legend(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (name, SVG of its line and marker) of everything in the plots."""
    entries = [(s.name, _line(s)) for s in series_of(rows)]
    if any(is_float(row) for row in rows):
        entries.append(("float", {"color": _FLOAT_COLOUR, "linestyle": (0, (5, 2)), "marker": ""}))
    if any(_drawn(_published(column), row) is not None for column in _PLOTTED for row in rows):
        hollow = {"color": _FLOAT_COLOUR, "linestyle": "", "marker": "o", "markerfacecolor": "white"}
        entries.append(("hollow, dotted: as published", hollow))
    swatches = []
    with our_style():
        for i, (name, look) in enumerate(entries):
            figure = Figure(figsize=(0.42, 0.2))
            figure.patch.set_alpha(0)
            axis = figure.add_axes((0, 0, 1, 1))
            axis.axis("off")
            axis.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], markersize=6, linewidth=1.4, **look)
            swatches.append((name, svg(figure, f"legend-{i}", "", {})))
    return swatches


def _drawn(column: Column, row: Row) -> float | None:
    """Return the number where it has a place in a plot (PSNR of equal images is infinite)."""
    value = number(column, row)
    return None if value is None or math.isinf(value) else value


def _spread(column: Column, row: Row) -> float:
    """Return the half-length of the bar through the row's point: of IS alone, as in the table."""
    return row.get("isc_std") or 0.0 if column.key == "isc" and not column.published else 0.0


def _published(column: Column) -> Column:
    return replace(column, published=True)


def _line(series: Series) -> dict[str, Any]:
    return {
        "color": series.colour,
        "marker": series.marker,
        "linestyle": (0, (2, 1.5)) if series.split else "-",
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def _against_bits(column: Column, rows: Sequence[Row]) -> str:
    figure, axis, titles = _figure(column, rows)
    paper = _published(column)
    order = sorted({bits(row) for row in rows if not is_float(row)}, reverse=True)
    shown = series_of(rows)
    for n, series in enumerate(shown):
        shift = _DODGE * (n - (len(shown) - 1) / 2)
        best: dict[float, float] = {}  # the line goes through the best of several rows of one width
        for i in series.rows:
            x = order.index(bits(rows[i])) + shift
            for source in (paper, column):
                value = _drawn(source, rows[i])
                if value is None:
                    continue
                key = f"{'paper' if source.published else 'point'}-{i}"
                titles[key] = _title(source, rows[i])
                hollow = {"markerfacecolor": "white", "markeredgecolor": series.colour, "markeredgewidth": 1.2}
                look = {**_line(series), **(hollow if source.published else {}), "linestyle": ""}
                axis.plot([x], [value], markersize=6.5, zorder=3, gid=key, **look)
                if source is column:
                    ends = [value + side * _spread(column, rows[i]) for side in (-1, 1)]
                    axis.vlines(x, *ends, color=series.colour, linewidth=1, alpha=0.5, zorder=1.5)
                    pick = min if column.better == "lower" else max
                    best[x] = pick(best.get(x, value), value)
        if best:
            key = f"series-{n}"
            titles[key] = series.name
            line = {**_line(series), "marker": ""}
            axis.plot(sorted(best), [best[x] for x in sorted(best)], linewidth=1.4, zorder=2, gid=key, **line)
    axis.set_xlim(-0.5, len(order) - 0.5)
    names = ["W{}A{}".format(*pair) for pair in order]
    crowded = len(names) > 6
    axis.set_xticks(range(len(order)), names, rotation=35 if crowded else 0, ha="right" if crowded else "center")
    axis.set_xlabel("bits of weights (W) and activations (A)")
    return svg(figure, f"{column.key}-bits", f"{column.title} against bits", titles)


def _against_size(column: Column, rows: Sequence[Row]) -> str:
    figure, axis, titles = _figure(column, rows)
    points: list[tuple[float, float, str]] = []
    sizes = [row["bytes"] / _BYTES_A_MB for row in rows if row.get("bytes")]
    if max(sizes) > _DECADE * min(sizes):
        axis.set_xscale("log")
        plain_log(axis.xaxis)
        axis.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    else:
        axis.set_xlim(0, 1.12 * max(sizes))
    shown = [(_line(series), series.rows) for series in series_of(rows)]
    grey = {"color": _FLOAT_COLOUR, "marker": "*", "markeredgecolor": "white", "markeredgewidth": 0.4}
    shown.append((grey, tuple(i for i, row in enumerate(rows) if is_float(row))))
    for look, members in shown:
        with_both = [i for i in members if _drawn(column, rows[i]) is not None and rows[i].get("bytes")]
        for i in with_both:
            x, y = rows[i]["bytes"] / _BYTES_A_MB, _drawn(column, rows[i])
            titles[f"point-{i}"] = f"{_title(column, rows[i])}, {x:.2f} MB"
            size = 9 if is_float(rows[i]) else 6.5
            axis.plot([x], [y], markersize=size, zorder=3, gid=f"point-{i}", **{**look, "linestyle": ""})
            points.append((x, y, "float" if is_float(rows[i]) else width(rows[i])))
    axis.set_xlabel("size of the file in MB")
    order = [width(row) for row in sorted(rows, key=bits, reverse=True)]
    write_labels(figure, axis, points, ["float", *order])
    return svg(figure, f"{column.key}-size", f"{column.title} against size", titles)


def _title(column: Column, row: Row) -> str:
    return f"{row['label']}: {column.title} {column.text(row)}{' as published' if column.published else ''}"


def _figure(column: Column, rows: Sequence[Row]) -> tuple[Figure, Any, dict[str, str]]:
    """Return a figure with the metric's axis (the same beside both axes of cost) and the line of float."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e6e6e6", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_ylabel(column.heading)
    paper = _published(column)
    values = [v for row in rows for v in (_drawn(column, row), _drawn(paper, row)) if v is not None]
    values += [
        _drawn(column, row) + side * _spread(column, row)
        for row in rows
        if _drawn(column, row) is not None
        for side in (-1, 1)
    ]
    low, high = min(values), max(values)
    if low > 0 and high > _DECADE * low:
        axis.set_yscale("log")
        plain_log(axis.yaxis)
        margin = (high / low) ** _MARGIN
        axis.set_ylim(low / margin, high * margin)
    else:
        margin = _MARGIN * (high - low) or 0.1 * abs(high) or 1
        # No plot shows more than all images.
        axis.set_ylim(low - margin, min(high + margin, 1.01) if column.key == "asked_share" else high + margin)
        axis.locator_params(axis="y", nbins=6)
        if column.key == "asked_share":
            axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        else:
            axis.ticklabel_format(axis="y", useOffset=False)
    titles: dict[str, str] = {}
    for i, row in enumerate(rows):
        for source, dashes in ((column, (5, 2)), (paper, (1, 2))):
            if is_float(row) and _drawn(source, row) is not None:
                key = f"{'paper' if source.published else 'float'}-{i}"
                titles[key] = _title(source, row)
                axis.axhline(_drawn(source, row), color=_FLOAT_COLOUR, linestyle=(0, dashes), linewidth=1.1, gid=key)
    return figure, axis, titles
