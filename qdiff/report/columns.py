"""The columns of a table of results: the name of each, which direction is better, and the number format."""

from __future__ import annotations

from dataclasses import replace

from qdiff.evaluation.column import LOWER, NOTHING, Column, Row
from qdiff.evaluation.registry import metric_columns
from qdiff.io.markdown import markdown_table
from qdiff.report.ranking import marked, standings


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds else NOTHING


def _millions(count: float) -> str:
    return f"{count / 1e6:.2f} M"


COSTS = (
    Column("noise_mse", "ε error", LOWER, "{:.2e}".format),
    Column("last_step_mse", "ε last step", LOWER, "{:.2e}".format),
    Column("mean_weight_bits", "mean W bits", LOWER, "{:.2f}".format, ranked=False),  # of mixed precision
    Column("mean_act_bits", "mean A bits", LOWER, "{:.2f}".format, ranked=False),
    Column("bytes", "file", LOWER, _megabytes),
    Column("counted_bytes", "counted", LOWER, _megabytes),
    Column("gbops", "GBops", LOWER, "{:,.1f}".format),
    Column("state_bytes", "state", LOWER, _megabytes),  # per image
    Column("additions", "additions", LOWER, _millions),  # per image and step
    Column("calibration_s", "calibration", LOWER, _seconds),
    Column("calibration_cpu_s", "CPU", LOWER, _seconds),
    Column("sampling_s", "sampling", LOWER, _seconds),
)


def columns_of(rows: list[Row]) -> list[Column]:
    """Return the columns that at least one row has a number for; a published number follows the measured one."""
    columns: list[Column] = []
    for metric in metric_columns():
        columns += [metric, replace(metric, title=f"{metric.title} (paper)", published=True)]
    return [column for column in (*columns, *COSTS) if any(column.text(row) != NOTHING for row in rows)]


def markdown(rows: list[Row], header: bool = True) -> str:
    """Return rows as a markdown table, with or without its header."""
    columns = columns_of(rows)
    ranks = [standings(column, rows) for column in columns]
    lines = [
        [row["label"], *(marked(c.text(row), rank[i]) for c, rank in zip(columns, ranks, strict=True))]
        for i, row in enumerate(rows)
    ]
    return markdown_table(lines, ["", *(column.heading for column in columns)] if header else None)
