"""Plots of a metric against activation bits: the effect of modulation and of the kind of ranges at each width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qdiff.evaluation.column import HIGHER, Column, Row
from qdiff.report.figures import our_style, svg
from qdiff.report.metric_axes import (
    FLOAT_COLOUR,
    FULL_BITS,
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

LEAST_WIDTHS = 3  # two widths are compared just as well in the plot of all results
_MODULATION = "modiff"
_TENSOR = "tensor"
# Colour and marker of modulated rows; rows without modulation are paler. Okabe and Ito's colours.
_STYLES = {
    ("qdiff", "tensor", None): ("#0072B2", "o"),
    ("qdiff", "sample", None): ("#D55E00", "s"),
    ("qdiff", "channel", None): ("#009E73", "^"),
}
_OTHER_STYLES = (("#CC79A7", "D"), ("#E69F00", "v"), ("#000000", "X"), ("#56B4E9", "P"), ("#8C564B", "p"))
_PALE = 0.5  # share of white in the paler colour
# By weight width, the widest first, and without split quantization before with it.
_DASHES = ("-", (0, (3, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_WEIGHTS_ALONE = "#9a9a9a"
_SIZE = (7.6, 3.5)  # inches; a third is the legend
_DODGE = 0.03  # offset between lines, as a share of the distance between two widths
_DOTS_AN_INCH = 150


class _Line(NamedTuple):
    """The properties shared by the rows of one line; ``base`` is the method without modulation."""

    weights: int
    split: bool
    base: str
    scale: str
    ablation: str | None
    modulated: bool

    @property
    def kind(self) -> tuple[str, str, str | None]:
        """The properties that a colour stands for."""
        return self.base, self.scale, self.ablation


def _line_of(row: Row) -> _Line:
    methods = row["method"].split("+")
    base = "+".join(method for method in methods if method != _MODULATION)
    return _Line(
        weights=bits(row)[0],
        split=bool(row.get("split")),
        base=base or "qdiff",  # MoDiff without another method uses Q-Diffusion's weights
        scale=row.get("ranges") or _TENSOR,
        ablation=row.get("ablation"),
        modulated=bool(row.get("modulate")) or _MODULATION in methods,
    )


def activation_series(rows: Sequence[Row]) -> list[Series]:
    """Return the rows with quantized activations, grouped by everything except the activation width.

    Colour and marker show the method, the kind of range and modulation; dashes show the weight width.
    """
    members: dict[_Line, list[int]] = {}
    for i, row in enumerate(rows):
        if not is_float(row) and bits(row)[1] < FULL_BITS:
            members.setdefault(_line_of(row), []).append(i)
    kinds = list(dict.fromkeys(line.kind for line in members))
    others = [kind for kind in kinds if kind not in _STYLES]
    styles = {**_STYLES, **{kind: _OTHER_STYLES[i % len(_OTHER_STYLES)] for i, kind in enumerate(others)}}
    dashes = _dashes(rows)
    several = len({line.scale for line in members}) > 1
    series = []
    # Lines to be compared, without and with modulation, are next to each other in the legend.
    ordered = sorted(members, key=lambda line: (-line.weights, line.split, kinds.index(line.kind), line.modulated))
    for line in ordered:
        colour, marker = styles[line.kind]
        name = f"W{line.weights} {method_name(rows[members[line][0]])}"
        name += f", {line.scale}" if several or line.scale != _TENSOR else ""
        name += (", split" if line.split else "") + (f", {line.ablation}" if line.ablation else "")
        shade = colour if line.modulated else _pale(colour)
        series.append(Series(name, shade, marker, dashes[line.weights, line.split], tuple(members[line])))
    return series


def _dashes(rows: Sequence[Row]) -> dict[tuple[int, bool], Any]:
    kinds = {(bits(row)[0], bool(row.get("split"))) for row in rows if not is_float(row)}
    ordered = sorted(kinds, key=lambda kind: (-kind[0], kind[1]))
    return {kind: _DASHES[i % len(_DASHES)] for i, kind in enumerate(ordered)}


def _pale(colour: str) -> str:
    return to_hex([_PALE + (1 - _PALE) * part for part in to_rgb(colour)])


def activation_plots(rows: Sequence[Row]) -> dict[str, str]:
    """Return plots as SVG, by key, of the metrics that were measured at `LEAST_WIDTHS` or more activation widths."""
    with our_style():
        return {column.key: _plot(column, rows) for column in plotted() if _widths(column, rows) >= LEAST_WIDTHS}


def pictured(rows: Sequence[Row]) -> Column | None:
    """Return the metric for a table's picture: FID, or the first with a plot; None if no metric has one."""
    return next((column for column in plotted() if _widths(column, rows) >= LEAST_WIDTHS), None)


def activation_picture(column: Column, rows: Sequence[Row], path: Path) -> None:
    """Write a metric's plot as a PNG."""
    with our_style():
        _drawing(column, rows)[0].savefig(path, dpi=_DOTS_AN_INCH, format="png", facecolor="white")


def _widths(column: Column, rows: Sequence[Row]) -> int:
    quantized = (row for row in rows if not is_float(row) and bits(row)[1] < FULL_BITS)
    return len({bits(row)[1] for row in quantized if drawn(column, row) is not None})


def _plot(column: Column, rows: Sequence[Row]) -> str:
    figure, titles = _drawing(column, rows)
    return svg(figure, f"{column.key}-activation-bits", f"{column.title} against activation bits", titles)


def _drawing(column: Column, rows: Sequence[Row]) -> tuple[Figure, dict[str, str]]:
    figure, axis, titles = metric_figure(column, rows, _SIZE)
    shown = [s for s in activation_series(rows) if any(drawn(column, rows[i]) is not None for i in s.rows)]
    order = sorted({bits(rows[i])[1] for series in shown for i in series.rows}, reverse=True)
    entries = []
    for n, series in enumerate(shown):
        shift = _DODGE * (n - (len(shown) - 1) / 2)
        places = {i: order.index(bits(rows[i])[1]) + shift for i in series.rows}
        titles |= draw_series(axis, column, rows, series, places, f"series-{n}")
        entries.append(Line2D([], [], label=series.name, linewidth=1.4, markersize=5.5, **series.look))
    titles |= _draw_weights_alone(axis, column, rows, entries)
    if any(is_float(row) and drawn(column, row) is not None for row in rows):
        entries.append(Line2D([], [], label="float", color=FLOAT_COLOUR, linestyle=(0, (5, 2)), linewidth=1.1))
    if any(drawn(published(column), row) is not None for row in rows):
        hollow = {"color": FLOAT_COLOUR, "linestyle": "", "marker": "o", "markerfacecolor": "white"}
        entries.append(Line2D([], [], label="hollow, dotted: as published", markersize=5.5, **hollow))
    axis.set_xlim(-0.5, len(order) - 0.5)
    axis.set_xticks(range(len(order)), [f"A{width}" for width in order])
    axis.set_xlabel("bits of activations")
    # The handle is long enough to show the dashes next to the marker.
    figure.legend(handles=entries, loc="outside right upper", frameon=False, fontsize=7.5, handlelength=3.4)
    return figure, titles


def _draw_weights_alone(axis: Any, column: Column, rows: Sequence[Row], entries: list[Line2D]) -> dict[str, str]:
    """Draw results with float activations as horizontal lines; return their titles by id."""
    titles: dict[str, str] = {}
    alone = [i for i, row in enumerate(rows) if not is_float(row) and bits(row)[1] == FULL_BITS]
    found = [i for i in alone if drawn(column, rows[i]) is not None]
    dashes = _dashes(rows)
    for kind in dict.fromkeys((bits(rows[i])[0], bool(rows[i].get("split"))) for i in found):
        of_kind = [i for i in found if (bits(rows[i])[0], bool(rows[i].get("split"))) == kind]
        pick = max if column.better == HIGHER else min
        best = pick(of_kind, key=lambda i: drawn(column, rows[i]))
        look = {"color": _WEIGHTS_ALONE, "linestyle": dashes[kind], "linewidth": 0.9}
        axis.axhline(drawn(column, rows[best]), zorder=1.2, gid=f"weights-{best}", **look)
        titles[f"weights-{best}"] = f"{rows[best]['label']}: {column.title} {column.text(rows[best])}"
        entries.append(Line2D([], [], label=f"W{kind[0]}A{FULL_BITS}{', split' if kind[1] else ''}", **look))
    return titles
