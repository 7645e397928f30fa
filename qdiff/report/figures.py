"""The style of figures and their conversion to SVG: logarithmic axes, labels next to points."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_FONT_SIZE = 8.5
_SVG_WIDER = 1.06  # glyphs drawn as paths are not fitted to pixels, as those that are measured
_INK, _FRAME = "#222222", "#b8b8b8"
_Box = tuple[float, float, float, float]
# Glyphs drawn as paths look the same everywhere; without the salt, ids would be random.
_RC = {
    "svg.fonttype": "path",
    "svg.hashsalt": "qdiff",
    "font.family": "DejaVu Sans",  # bundled with matplotlib
    "font.size": _FONT_SIZE,
    "axes.edgecolor": _FRAME,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
}


def our_style() -> AbstractContextManager[None]:
    """Return the context in which figures are made and saved."""
    return style.context(["default", _RC])  # a user's matplotlibrc must not affect the page


def plain_log(axis: Any) -> None:
    """Label a logarithmic axis at 1, 2 and 5 of each decade with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def write_labels(figure: Figure, axis: Any, points: list[tuple[float, float, str]], order: list[str]) -> None:
    """Write labels next to points where they cover least.

    Args:
        points: x, y and text; points with an empty text have no label and are not covered either.
        order: of all texts. Coinciding points share one label, its parts in this order.
    """
    if not points:
        return
    figure.draw_without_rendering()  # computes the layout
    figure.set_layout_engine("none")
    reach = 0.09 * figure.dpi  # half a marker plus a margin
    clusters: list[list[tuple[float, float, str]]] = []
    for x, y, text in points:
        px, py = axis.transData.transform((x, y))
        near = (c for c in clusters if any(abs(px - a) < 1.6 * reach and abs(py - b) < 1.6 * reach for a, b, _ in c))
        cluster = next(near, None)
        if cluster is None:
            clusters.append(cluster := [])
        cluster.append((px, py, text))
    inside: _Box = tuple(axis.bbox.extents)
    taken = [_around([point], reach) for cluster in clusters for point in cluster]
    rules: list[_Box] = []
    for line in axis.lines:
        if line.get_linestyle() != "None" and len(line.get_ydata()) == 2:  # the horizontal line of float
            y = axis.transData.transform((1, line.get_ydata()[0]))[1]
            rules.append((inside[0], y - 1.5, inside[2], y + 1.5))
    for cluster in clusters:
        label = ", ".join(sorted({t for *_, t in cluster if t}, key=order.index))
        if not label:
            continue
        left, bottom, right, top = _around(cluster, reach)
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        text = axis.text(0, 0, label, fontsize=_FONT_SIZE - 1, zorder=2.5, bbox=behind)
        extent = text.get_window_extent()
        w, h = _SVG_WIDER * extent.width, extent.height
        middle, centre = (bottom + top - h) / 2, (left + right - w) / 2
        places = [(right, middle), (centre, top), (centre, bottom - h), (left - w, middle)]
        places += [(right, top), (right, bottom - h), (left - w, top), (left - w, bottom - h)]
        places = [(max(inside[0], min(x, inside[2] - w)), y) for x, y in places]

        def cost(rank: int, places: list[tuple[float, float]] = places, w: float = w, h: float = h) -> float:
            x, y = places[rank]
            box = (x, y, x + w, y + h)
            # Markers and other labels cost most; float's line may run behind a label; earlier places read better.
            covered = sum(_overlap(box, other) for other in taken) + w * h - _overlap(box, inside)
            return covered + 0.1 * sum(_overlap(box, rule) for rule in rules) + 0.02 * rank * w * h

        x, y = places[min(range(len(places)), key=cost)]
        taken.append((x, y, x + w, y + h))
        text.set_position(axis.transData.inverted().transform((x, y)))
        text.set_verticalalignment("bottom")


def _around(points: Iterable[tuple[float, float, str]], reach: float) -> _Box:
    xs, ys = zip(*((x, y) for x, y, _ in points), strict=True)
    return min(xs) - reach, min(ys) - reach, max(xs) + reach, max(ys) + reach


def _overlap(a: _Box, b: _Box) -> float:
    across, up = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return across * up if across > 0 and up > 0 else 0.0


def svg(figure: Figure, prefix: str, name: str, titles: dict[str, str]) -> str:
    """Return a figure as an SVG element that can share a page with others."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("xlink:href=", "href=")
    text = re.sub(r"<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)  # would apply to the whole page
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)  # HTML needs no namespaces
    text = with_prefix(text, prefix)
    for key, title in titles.items():
        group = f'<g id="{prefix}-{key}">'
        # A line through a single point is an empty group; give it a closing tag.
        text = text.replace(f"{group[:-1]}/>", f"{group}</g>", 1)
        text = text.replace(group, f"{group}<title>{html.escape(title)}</title>", 1)
    return text.replace(
        "<svg ", f'<svg role="img" aria-label="{html.escape(name)}" ' if name else '<svg aria-hidden="true" ', 1
    )


def with_prefix(text: str, prefix: str) -> str:
    """Return SVG elements with a prefix to every id, which must be unique in a page."""
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    return text.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
