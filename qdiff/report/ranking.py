"""Which rows are the best of their widths, and which of the others are as good within the spread of their seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

from qdiff.evaluation.column import LOWER, Column, Row


class Standing(Enum):
    """A number among those of rows with the same widths."""

    BEST = "best"
    EQUAL = "equal"
    OTHER = "other"


def standings(column: Column, rows: Sequence[Row]) -> list[Standing]:
    """Return the standing of every row's number, among the rows of tables with several seeds.

    A number is equal to the best if they differ by at most √(s² + s²), s being each one's deviation over its seeds. A
    row of which only one seed was run has the largest deviation among those of its widths. Where no row of these widths
    has two seeds, nobody knows the spread, so that none has a standing.
    """
    found = [Standing.OTHER] * len(rows)
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        value = column.value(row)
        if not row.get("seeds") or value is None or math.isnan(value) or not column.ranked or column.published:
            continue
        groups.setdefault((row.get("weight_bits"), row.get("act_bits")), []).append(i)
    for members in groups.values():
        values = {i: column.value(rows[i]) for i in members}
        known = {i: column.spread_in(rows[i]) for i in members if rows[i]["seeds"] > 1}
        if not known or len(set(values.values())) == 1:
            continue
        spreads = {i: known.get(i, max(known.values())) for i in members}
        best = (min if column.better == LOWER else max)(members, key=values.__getitem__)
        found[best] = Standing.BEST
        for i in members:
            if i != best and abs(values[i] - values[best]) <= math.hypot(spreads[i], spreads[best]):
                found[i] = Standing.EQUAL
    return found


def marked(text: str, standing: Standing) -> str:
    """Return a cell of a markdown table with the mark of its standing."""
    return {Standing.BEST: f"**{text}**", Standing.EQUAL: f"{text} =", Standing.OTHER: text}[standing]
