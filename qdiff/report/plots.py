"""Plots of results as SVG for a web page: a metric against bits, file size and calibration time; and their legends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from qdiff.evaluation.column import Column, Row
from qdiff.report.cost_plots import SIZE, TIME, cost_plot, shapes
from qdiff.report.figures import our_style, svg
from qdiff.report.metric_axes import (
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
)

Styles = Mapping[str, tuple[str, str]]

# Okabe and Ito's colours can be told apart with any colour vision, and the markers in print.
_STYLES = {
    "linear": ("#D55E00", "s"),
    "qdiff": ("#0072B2", "o"),
    "eda-dm": ("#009E73", "^"),
    "ptq4dm": ("#E69F00", "v"),
    "modiff": ("#CC79A7", "D"),
    "tfmq-dm": ("#56B4E9", "P"),
    "gptq": ("#8C564B", "p"),
    "grip": ("#000000", "X"),
}
_OTHER_STYLES = (("#7A6FF0", "h"), ("#B5A300", "<"), ("#7F7F7F", ">"), ("#A3004F", "d"))
_SIZE = (4.8, 2.9)  # inches
_DODGE = 0.09  # share of the distance between two widths, so that equal results of two methods are both visible
_SPLIT_DASHES = (0, (2, 1.5))
_FLOAT = ("float", {"color": FLOAT_COLOUR, "linestyle": (0, (5, 2)), "marker": ""})


@dataclass(frozen=True)
class MetricPlots:
    """The plots of one metric as SVG.

    Attributes:
        column: the metric.
        spread: whether a row has error bars (one standard deviation).
        against_bits: the plot against bits; None if it was not asked for.
        against_size, against_time: the plots against file size and calibration time; None if no measured row has these.
    """

    column: Column
    spread: bool
    against_bits: str | None
    against_size: str | None
    against_time: str | None


def styles_of(rows: Iterable[Row]) -> Styles:
    """Return colour and marker of each method; those of the usual methods do not depend on the rows."""
    others = [m for m in dict.fromkeys(row["method"] for row in rows if not is_float(row)) if m not in _STYLES]
    return {**_STYLES, **{m: _OTHER_STYLES[i % len(_OTHER_STYLES)] for i, m in enumerate(others)}}


def series_of(rows: Sequence[Row], styles: Styles | None = None) -> list[Series]:
    """Return the quantized rows by method.

    Args:
        styles: of more rows than these, from `styles_of`; None: of these.
    """
    members: dict[tuple[str, bool], list[int]] = {}
    for i, row in enumerate(rows):
        if not is_float(row):
            members.setdefault((row["method"], bool(row.get("split"))), []).append(i)
    styles = styles_of(rows) if styles is None else styles
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
    with our_style():
        plots = [_plots_of(column, rows, series_of(rows), shapes(rows)) for column in plotted()]
    return [plot for plot in plots if plot is not None]


def quality_plots(rows: Sequence[Row], key: str, among: Sequence[Row]) -> MetricPlots | None:
    """Return the plots of one metric against size and time; None if no quantized row has a number for it.

    Args:
        key: of the metric.
        among: the rows of all tables on the page, so that a colour and a shape mean the same in each.
    """
    series, looks = series_of(rows, styles_of(among)), shapes(among)
    column = next(column for column in plotted() if column.key == key)
    with our_style():
        return _plots_of(column, rows, series, looks, bits_too=False)


def _plots_of(
    column: Column,
    rows: Sequence[Row],
    series: Sequence[Series],
    looks: dict[str, dict[str, Any]],
    bits_too: bool = True,
) -> MetricPlots | None:
    measured = [row for row in rows if not is_float(row) and drawn(column, row) is not None]
    if not measured:
        return None
    return MetricPlots(
        column,
        any(column.spread_in(row) for row in measured),
        _against_bits(column, rows, series) if bits_too else None,
        cost_plot(column, SIZE, rows, series, looks),
        cost_plot(column, TIME, rows, series, looks),
    )


def legend(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (name, SVG of its line and marker) of everything in the plots against bits."""
    entries = [(s.name, s.look) for s in series_of(rows)]
    if any(is_float(row) for row in rows):
        entries.append(_FLOAT)
    if any(drawn(published(column), row) is not None for column in plotted() for row in rows):
        hollow = {"color": FLOAT_COLOUR, "linestyle": "", "marker": "o", "markerfacecolor": "white"}
        entries.append(("hollow, dotted: as published", hollow))
    return _swatches(entries, "legend")


def colour_legend(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (name, SVG of a line in its colour) of every method in the rows, and of float."""
    styles = styles_of(rows)
    methods = dict.fromkeys(row["method"] for row in rows if not is_float(row))
    entries = [(method_name({"method": m}), {"color": styles[m][0], "marker": ""}) for m in methods]
    return _swatches([*entries, *([_FLOAT] if any(map(is_float, rows)) else [])], "colour")


def shape_legend(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return (width, SVG of its marker) of every width in the plots against size and time."""
    grey = {"color": FLOAT_COLOUR, "linestyle": ""}
    return _swatches([(name, {**grey, **look}) for name, look in shapes(rows).items()], "shape")


def _swatches(entries: Sequence[tuple[str, dict[str, Any]]], prefix: str) -> list[tuple[str, str]]:
    swatches = []
    with our_style():
        for i, (name, look) in enumerate(entries):
            figure = Figure(figsize=(0.42, 0.2))
            figure.patch.set_alpha(0)
            axis = figure.add_axes((0, 0, 1, 1))
            axis.axis("off")
            axis.plot([0, 0.5, 1], [0, 0, 0], markevery=[1], markersize=6, linewidth=1.4, **look)
            swatches.append((name, svg(figure, f"{prefix}-{i}", "", {})))
    return swatches


def _against_bits(column: Column, rows: Sequence[Row], shown: Sequence[Series]) -> str:
    figure, axis, titles = metric_figure(column, rows, _SIZE)
    order = sorted({bits(row) for row in rows if not is_float(row)}, reverse=True)
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
