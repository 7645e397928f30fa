"""Plots of results as SVG for a web page: a metric against bits, and against file size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from qdiff.evaluation.column import Column, Row
from qdiff.report.figures import our_style, plain_log, svg, write_labels
from qdiff.report.metric_axes import (
    DECADE,
    FLOAT_COLOUR,
    Series,
    bits,
    draw_series,
    drawn,
    is_float,
    method_name,
    metric_figure,
    plotted,
    published,
    title_of,
    width,
)

# Okabe and Ito's colours can be told apart with any colour vision, and the markers in print.
_STYLES = {
    "linear": ("#D55E00", "s"),
    "qdiff": ("#0072B2", "o"),
    "eda-dm": ("#009E73", "^"),
    "ptq4dm": ("#E69F00", "v"),
    "modiff": ("#CC79A7", "D"),
}
_OTHER_STYLES = (("#56B4E9", "P"), ("#000000", "X"), ("#8C564B", "p"))
_SIZE = (4.8, 2.9)  # inches
_DODGE = 0.09  # share of the distance between two widths, so that equal results of two methods are both visible
_BYTES_A_MB = 1e6
_SPLIT_DASHES = (0, (2, 1.5))


@dataclass(frozen=True)
class MetricPlots:
    """The plots of one metric as SVG.

    Attributes:
        column: the metric.
        spread: whether the plot against bits has error bars (one standard deviation).
        against_bits: the plot against bits.
        against_size: the plot against file size; None if no measured row has a size.
    """

    column: Column
    spread: bool
    against_bits: str
    against_size: str | None


def series_of(rows: Sequence[Row]) -> list[Series]:
    """Return the quantized rows by method; a method's colour and marker do not depend on the other methods."""
    members: dict[tuple[str, bool], list[int]] = {}
    for i, row in enumerate(rows):
        if not is_float(row):
            members.setdefault((row["method"], bool(row.get("split"))), []).append(i)
    others = [method for method in dict.fromkeys(method for method, _ in members) if method not in _STYLES]
    styles = {**_STYLES, **{m: _OTHER_STYLES[i % len(_OTHER_STYLES)] for i, m in enumerate(others)}}
    return [
        Series(
            method_name({"method": method}) + (", split" if split else ""),
            *styles[method],
            _SPLIT_DASHES if split else "-",
            tuple(indices),
        )
        for (method, split), indices in members.items()
    ]


def metric_plots(rows: Sequence[Row]) -> list[MetricPlots]:
    """Return plots of every metric for which a quantized row has a number."""
    quantized = [row for row in rows if not is_float(row)]
    plots = []
    with our_style():
        for column in plotted():
            measured = [row for row in quantized if drawn(column, row) is not None]
            if measured:
                spread = any(column.spread_in(row) for row in measured)
                sized = any(row.get("bytes") for row in measured)
                against_size = _against_size(column, rows) if sized else None
                plots.append(MetricPlots(column, spread, _against_bits(column, rows), against_size))
    return plots


def legend(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (name, SVG of its line and marker) of everything in the plots."""
    entries = [(s.name, s.look) for s in series_of(rows)]
    if any(is_float(row) for row in rows):
        entries.append(("float", {"color": FLOAT_COLOUR, "linestyle": (0, (5, 2)), "marker": ""}))
    if any(drawn(published(column), row) is not None for column in plotted() for row in rows):
        hollow = {"color": FLOAT_COLOUR, "linestyle": "", "marker": "o", "markerfacecolor": "white"}
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


def _against_bits(column: Column, rows: Sequence[Row]) -> str:
    figure, axis, titles = metric_figure(column, rows, _SIZE)
    order = sorted({bits(row) for row in rows if not is_float(row)}, reverse=True)
    shown = series_of(rows)
    for n, series in enumerate(shown):
        shift = _DODGE * (n - (len(shown) - 1) / 2)
        places = {i: order.index(bits(rows[i])) + shift for i in series.rows}
        titles |= draw_series(axis, column, rows, series, places, f"series-{n}")
    axis.set_xlim(-0.5, len(order) - 0.5)
    names = ["W{}A{}".format(*pair) for pair in order]
    crowded = len(names) > 6
    axis.set_xticks(range(len(order)), names, rotation=35 if crowded else 0, ha="right" if crowded else "center")
    axis.set_xlabel("bits of weights (W) and activations (A)")
    return svg(figure, f"{column.key}-bits", f"{column.title} against bits", titles)


def _against_size(column: Column, rows: Sequence[Row]) -> str:
    figure, axis, titles = metric_figure(column, rows, _SIZE)
    points: list[tuple[float, float, str]] = []
    sizes = [row["bytes"] / _BYTES_A_MB for row in rows if row.get("bytes")]
    if max(sizes) > DECADE * min(sizes):
        axis.set_xscale("log")
        plain_log(axis.xaxis)
        axis.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    else:
        axis.set_xlim(0, 1.12 * max(sizes))
    shown = [(series.look, series.rows) for series in series_of(rows)]
    grey = {"color": FLOAT_COLOUR, "marker": "*", "markeredgecolor": "white", "markeredgewidth": 0.4}
    shown.append((grey, tuple(i for i, row in enumerate(rows) if is_float(row))))
    for look, members in shown:
        with_both = [i for i in members if drawn(column, rows[i]) is not None and rows[i].get("bytes")]
        for i in with_both:
            x, y = rows[i]["bytes"] / _BYTES_A_MB, drawn(column, rows[i])
            titles[f"point-{i}"] = f"{title_of(column, rows[i])}, {x:.2f} MB"
            size = 9 if is_float(rows[i]) else 6.5
            axis.plot([x], [y], markersize=size, zorder=3, gid=f"point-{i}", **{**look, "linestyle": ""})
            points.append((x, y, "float" if is_float(rows[i]) else width(rows[i])))
    axis.set_xlabel("size of the file in MB")
    order = [width(row) for row in sorted(rows, key=bits, reverse=True)]
    write_labels(figure, axis, points, ["float", *order])
    return svg(figure, f"{column.key}-size", f"{column.title} against size", titles)
