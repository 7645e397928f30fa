"""Self-contained web pages of results: of one table, and of several tables together.

The first images of every row and the sortable table come first, then plots, then the protocol. The page of one table
also has a grid of images and the command of every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from qdiff.evaluation.column import Column, Row
from qdiff.io.files import written_whole
from qdiff.report.activation_plots import activation_plots
from qdiff.report.columns import columns_of
from qdiff.report.figures import with_prefix
from qdiff.report.metric_axes import is_float
from qdiff.report.page_pictures import AMPLIFIED, PANEL, Picture, grids, strips
from qdiff.report.page_table import has_seeds, page_table
from qdiff.report.plots import MetricPlots, colour_legend, legend, metric_plots, quality_plots, shape_legend

_QUALITY = "noise_mse"  # the metric that a page of several tables plots: every quantized row has it, and it is precise


@dataclass(frozen=True)
class TableResults:
    """A table as a page shows it.

    Attributes:
        title: the heading.
        protocol: names and values of the settings that all rows share, in the order shown.
        rows: numbers as in `qdiff.report.columns`, and ``method``, ``weight_bits`` and ``act_bits`` (32 is
            float), ``split``, ``images``, ``flags`` (sentences on what is wrong with the row) and ``command``; rows
            with modulation or dynamic ranges also have ``modulate``, ``ranges`` and ``ablation``.
        folders: label of a row → its images, from ``00000.png`` on; image i has the same noise in all rows. Rows
            without a folder, or whose folder has no ``00000.png``, are shown without images.
        notes: sentences below the table.
    """

    title: str
    protocol: Sequence[tuple[str, str]] = ()
    rows: Sequence[Row] = ()
    folders: dict[str, Path] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Part:
    """What the templates show of a table, beside its own values: cells, pictures and plots.

    Attributes:
        flags: (number of the row, its label, sentence).
        counts: whether the rows differ in their number of images; otherwise the protocol states it.
        seeds: whether the best of each width is marked, and not that of all rows.
    """

    title: str
    protocol: Sequence[tuple[str, str]]
    notes: Sequence[str]
    flags: list[tuple[int, str, str]]
    columns: list[Column]
    counts: bool
    seeds: bool
    table: list[dict[str, Any]]
    strips: list[tuple[str, Picture]]
    plots: Sequence[MetricPlots] = ()


def write_page(path: Path, results: TableResults) -> None:
    """Write the page of one table; the same input gives the same bytes.

    Args:
        path: the page; the write is atomic.
        results: the table.
    """
    rows = results.rows
    pictures, shown = grids(rows, results.folders)
    part = replace(_part(results), plots=metric_plots(rows))
    _write(
        path,
        "page.html.j2",
        title=results.title,
        part=part,
        activation_plots=activation_plots(rows),
        legend=legend(rows),
        shapes=shape_legend(rows),
        pictures=pictures,
        float_row=next((i for i, row in enumerate(rows) if is_float(row) and pictures[i]), None),
        shown=shown,
        amplified=AMPLIFIED,
    )


def write_tables_page(path: Path, title: str, tables: Sequence[TableResults]) -> None:
    """Write the page of several tables; the same input gives the same bytes.

    Args:
        path: the page; the write is atomic.
        title: the page's heading.
        tables: in the order shown. Of one without rows, the page shows the title and the notes.
    """
    every = [row for table in tables for row in table.rows]
    parts = []
    for i, table in enumerate(tables):
        plots = quality_plots(table.rows, _QUALITY, every)
        parts.append(replace(_part(table), plots=[] if plots is None else [_renamed(plots, f"t{i}")]))
    plotted = any(part.plots for part in parts)
    _write(
        path,
        "tables.html.j2",
        title=title,
        tables=parts,
        colours=colour_legend(every) if plotted else [],
        shapes=shape_legend(every) if plotted else [],
    )


def _write(path: Path, template: str, **values: Any) -> None:
    environment = Environment(
        loader=FunctionLoader(lambda name: resources.files("qdiff.report").joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(panel=PANEL, **values)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _part(results: TableResults) -> _Part:
    rows = results.rows
    return _Part(
        results.title,
        results.protocol,
        results.notes,
        flags=[(i, row["label"], flag) for i, row in enumerate(rows) for flag in row.get("flags") or ()],
        columns=columns_of(list(rows)),
        counts=len({row.get("images") for row in rows}) > 1,
        seeds=has_seeds(rows),
        table=page_table(rows),
        strips=strips(rows, results.folders),
    )


def _renamed(plot: MetricPlots, prefix: str) -> MetricPlots:
    """Return the plots with other ids, so that tables of the same metrics can share a page."""
    drawings = {"against_bits": plot.against_bits, "against_size": plot.against_size, "against_time": plot.against_time}
    return replace(plot, **{k: with_prefix(v, prefix) for k, v in drawings.items() if v is not None})
