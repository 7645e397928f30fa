"""A row of a table file that stands for one row a combination of values."""

from __future__ import annotations

import itertools
from typing import Any

from qdiff.errors import UserError

_FILLED = ("label", "options", "weights_from")
_EXAMPLE = "write it like grid: {w: [8, 4], a: [8, 6]} (see configs/tables/modiff-digits.yaml)"


def expand(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that one entry of a table's ``rows`` stands for: itself, or those of its grid.

    Args:
        row: as the file has it. Its ``grid`` maps names to lists of values; for every combination, the first name
            varying slowest, the names in braces in ``label``, ``options`` and ``weights_from`` are replaced by the
            values (`str.format`). The other keys are those of every row.

    Raises:
        UserError: the grid is malformed, a name in braces is none of it, or numbers of a paper are given to all rows.
    """
    if "grid" not in row:
        return [row]
    label = row.get("label")
    axes = _axes(row["grid"], label)
    if row.get("published") or row.get("unverified"):
        raise UserError(f"grid {label}: published numbers are those of one row; write that row out")
    rest = {key: value for key, value in row.items() if key != "grid"}
    rows = []
    for values in itertools.product(*axes.values()):
        names = dict(zip(axes, values, strict=True))
        filled = {key: _fill(rest[key], names, label, key) for key in _FILLED if isinstance(rest.get(key), str)}
        rows.append({**rest, **filled})
    return rows


def _axes(grid: Any, label: Any) -> dict[str, list[str | int | float]]:
    """Return the grid, checked."""
    if not isinstance(grid, dict) or not grid:
        raise UserError(f"grid {label}: {grid!r} is no mapping of names to lists of values; {_EXAMPLE}")
    for name, values in grid.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"grid {label}: {name!r} is no name to put in braces; {_EXAMPLE}")
        if not isinstance(values, list) or not values:
            raise UserError(f"grid {label}: {name} is {values!r}, which is no list of values; {_EXAMPLE}")
        for value in values:
            # YAML takes yes, no, on and off for booleans, which no option means.
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise UserError(f"grid {label}: {name} has {value!r}, which is neither a number nor text; correct it")
    return grid


def _fill(text: str, names: dict[str, Any], label: Any, key: str) -> str:
    try:
        return text.format(**names)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        known = ", ".join(f"{{{name}}}" for name in names)
        raise UserError(
            f"grid {label}: {key} {text!r} has braces around something else than {known}; correct it"
        ) from None
