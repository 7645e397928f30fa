"""A table of what papers publish, for tables whose files are not at hand: every row is marked as not run."""

from __future__ import annotations

from qdiff.cli.table_file import TableFile
from qdiff.errors import UserError
from qdiff.io.markdown import markdown_table
from qdiff.report.columns import columns_of

NOT_RUN = "not run"


def unverified_note(table: TableFile) -> str | None:
    """Return a sentence that names the rows whose numbers were quoted from memory of the paper; None if none was."""
    marked = ", ".join(row.label for row in table.rows if row.unverified)
    return f"Published numbers quoted from memory of the paper, to be verified: {marked}." if marked else None


def published_markdown(table: TableFile) -> str:
    """Return a table's rows with their published numbers, the source and the notes as markdown without a title.

    Raises:
        UserError: no row has a published number.
    """
    rows = [{"label": row.label, "published": dict(row.published)} for row in table.rows if row.published]
    if not rows:
        raise UserError(f"table {table.path} has no published numbers; give a table whose rows have some")
    columns = columns_of(rows)
    head = ["", *(column.heading for column in columns), "measured here"]
    lines = [[row["label"], *(column.text(row) for column in columns), NOT_RUN] for row in rows]
    told = [f"Published numbers: {table.source or 'the table names no source'}."]
    if others := ", ".join(row.label for row in table.rows if not row.published):
        told.append(f"Rows without a published number, not run either: {others}.")
    told += [*table.notes, *([note] if (note := unverified_note(table)) else [])]
    return "\n\n".join([markdown_table(lines, head), *told]) + "\n"
