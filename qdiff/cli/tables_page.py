"""One page of several tables, from what their runs left behind: nothing is run and nothing measured."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qdiff.cli.table_file import TableFile
from qdiff.errors import UserError, first_line
from qdiff.io.files import check_writable
from qdiff.report.page import TableResults, write_tables_page


def tables_page(path: Path, title: str, tables: Sequence[TableFile]) -> list[str]:
    """Write the page.

    Args:
        path: the page; the write is atomic.
        title: its heading.
        tables: in the order shown; those without results are said to be not yet run.

    Returns:
        The titles of the tables that have no results yet.

    Raises:
        UserError: the page cannot be written, or a table's results are damaged.
    """
    check_writable(path)
    results = [_results(table) for table in tables]
    write_tables_page(path, title, results)
    return [result.title for result in results if not result.rows]


def _results(table: TableFile) -> TableResults:
    """Return what ``table.json`` holds, with the folders of the rows' images."""
    file = table.out / "table.json"
    if not file.is_file():
        command = shlex.join(["python", "scripts/reproduce.py", str(table.path)])
        return TableResults(table.title, notes=[f"Not yet run: {command}"])
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows = [dict(row) for row in found["rows"]]
        for row in rows:
            _ = row["label"], row["method"], row["weight_bits"], row["act_bits"]
        protocol, notes, title = list(dict(found["protocol"]).items()), list(found["notes"]), str(found["title"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} holds no results of a table ({first_line(error)}); write it again with scripts/reproduce.py"
        ) from error
    return TableResults(title, protocol, rows, _images(table, rows), notes)


def _images(table: TableFile, rows: Sequence[dict[str, Any]]) -> dict[str, Path]:
    """Return the images of each row of results: its own, or those of its first seed that has any."""
    folders: dict[str, Path] = {}
    for label in (row["label"] for row in rows):
        own = [table.images(row.label) for row in table.rows if label in (row.label, row.group)]
        if there := [folder for folder in own if folder.is_dir()]:
            folders[label] = there[0]
    return folders
