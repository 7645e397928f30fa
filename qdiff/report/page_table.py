"""The cells of a page's table: their texts, what JavaScript sorts by, and which are the best."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qdiff.evaluation.column import LOWER, NOTHING, Column, Row
from qdiff.report.columns import columns_of
from qdiff.report.metric_axes import bits, is_float, method_name, number, width
from qdiff.report.ranking import Standing, standings


@dataclass(frozen=True)
class Cell:
    """One cell of the table; JavaScript sorts by ``number``, which is None for empty cells."""

    text: str
    number: str | None
    best: bool
    published: bool


def page_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the values that the template shows per row."""
    by_column = [_cells(column, rows) for column in columns_of(list(rows))]
    table = []
    for i, row in enumerate(rows):
        weights, activations = bits(row)
        table.append(
            {
                "label": row["label"],
                "method": method_name(row) + (", split" if row.get("split") else ""),
                "float": is_float(row),
                "width": "float" if is_float(row) else width(row),
                "bits": weights + activations / 100,  # sorts by weight bits, then by activation bits
                "images": row.get("images"),
                "cells": [cells[i] for cells in by_column],
                "flags": row.get("flags") or (),
                "command": row.get("command"),
            }
        )
    return table


def has_seeds(rows: Sequence[Row]) -> bool:
    """Whether rows stand for several seeds, so that numbers compete within their widths and have equals."""
    return any(row.get("seeds") for row in rows)


def _cells(column: Column, rows: Sequence[Row]) -> list[Cell]:
    texts = [column.text(row) for row in rows]
    values = [None if text == NOTHING else number(column, row) for text, row in zip(texts, rows, strict=True)]
    if has_seeds(rows):
        ranks = standings(column, rows)
        best = [rank is Standing.BEST for rank in ranks]
        texts = [f"{text} =" if rank is Standing.EQUAL else text for text, rank in zip(texts, ranks, strict=True)]
    else:
        best = _best(column, rows, values)
    return [
        # JavaScript's Infinity: PSNR of equal images.
        Cell(text, None if value is None else json.dumps(value), is_best, column.published)
        for text, value, is_best in zip(texts, values, best, strict=True)
    ]


def _best(column: Column, rows: Sequence[Row], values: Sequence[float | None]) -> list[bool]:
    """Return which numbers are the best of all quantized rows: none of a paper or not ranked, or if all are equal."""
    rivals = [v for v, row in zip(values, rows, strict=True) if v is not None and not is_float(row)]
    if len(set(rivals)) < 2 or column.published or not column.ranked:
        return [False] * len(rows)
    best = (min if column.better == LOWER else max)(rivals)
    return [value == best and not is_float(row) for value, row in zip(values, rows, strict=True)]
