"""Rows that are repeated with several calibration seeds and shown as one: means and deviations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qdiff.cli.table_file import TableRow

_NAMED = ("label", "command", "flags", "published")  # of a row of results; everything else is a number or a setting


def summarise(
    rows: Sequence[TableRow], results: Sequence[dict[str, Any]], images: Callable[[str], Path]
) -> tuple[list[dict[str, Any]], dict[str, Path]]:
    """Return the rows to show, and the images of each: one row per group of seeds, others as they are.

    A row of a group has ``seeds``, their number, the mean of every number, and its standard deviation over the seeds as
    ``<key>_std``, which replaces the spread that a number has by itself. Numbers that a seed lacks are left out.

    Args:
        rows: of the table's file.
        results: of the rows that are finished, see `qdiff.report.columns`.
        images: the folder of a row's images by its label; a group shows those of its first seed.
    """
    groups = {row.label: row.group or row.label for row in rows}
    members: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        members.setdefault(groups[result["label"]], []).append(result)
    repeated = {row.group for row in rows if row.group is not None}
    shown = [_mean(label, some) if label in repeated else some[0] for label, some in members.items()]
    return shown, {label: images(some[0]["label"]) for label, some in members.items()}


def not_shown(rows: Sequence[TableRow], results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the labels of the rows without a result; of a group without any result, the group's label.

    Args:
        rows, results: as for `summarise`.
    """
    finished = {result["label"] for result in results}
    begun = {row.group for row in rows if row.label in finished}
    missing = [row for row in rows if row.label not in finished]
    return list(dict.fromkeys(row.label if row.group in begun else row.group or row.label for row in missing))


def _mean(label: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    first = members[0]
    made = {**first, "label": label, "seeds": len(members), "flags": [f for m in members for f in m["flags"]]}
    for key in [k for k in first if k not in _NAMED]:
        values = [member.get(key) for member in members]
        if key.endswith("_std") or isinstance(first[key], bool | str):
            continue
        if any(v is None for v in values):
            made[key] = None
        elif all(math.isfinite(v) for v in values):
            made[key] = statistics.fmean(values) if len(set(values)) > 1 else first[key]
            made[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return made
