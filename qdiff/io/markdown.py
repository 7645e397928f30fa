"""Tables in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(lines: Iterable[Sequence[str]], head: Sequence[str] | None = None) -> str:
    """Return a table from the texts of its cells; without ``head``, lines to add to a table.

    A "|" would end a cell and is replaced by "/".
    """
    if head is not None:
        lines = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
