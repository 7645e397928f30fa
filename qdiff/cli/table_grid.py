"""Expand an entry of a table file into rows: one per combination of a grid's values, and one per seed."""

from __future__ import annotations

import itertools
from typing import Any

from qdiff.errors import UserError

_FILLED = ("label", "options", "weights_from")
_EXAMPLE = "write it like grid: {w: [8, 4], a: [8, 6]} (see configs/tables/modiff-digits.yaml)"


def expand(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of one entry of a table's ``rows``: the entry itself, or the rows of its grid.

    Args:
        row: the entry as in the file. Its ``grid`` maps names to lists of values; for every combination, with the
            first name varying slowest, the names in braces in ``label``, ``options`` and ``weights_from`` are replaced
            by the values (`str.format`). The other keys are copied to every row. ``seeds`` lists the calibration seeds
            with which each of these rows is run; every one is a row of its own, records its own calibration set and
            takes weights from the same seed.

    Raises:
        UserError: the grid is malformed, a name in braces is not in the grid, or the entry has published numbers, which
            would apply to all rows.
    """
    if "seeds" in row:
        return [one for entry in expand({k: v for k, v in row.items() if k != "seeds"}) for one in _by_seed(entry, row)]
    if "grid" not in row:
        return [row]
    label = row.get("label")
    axes = _axes(row["grid"], label)
    if row.get("published") or row.get("unverified"):
        raise UserError(f"grid {label}: published numbers belong to one row; write that row out")
    rest = {key: value for key, value in row.items() if key != "grid"}
    rows = []
    for values in itertools.product(*axes.values()):
        names = dict(zip(axes, values, strict=True))
        filled = {key: _fill(rest[key], names, label, key) for key in _FILLED if isinstance(rest.get(key), str)}
        rows.append({**rest, **filled})
    return rows


def _by_seed(entry: dict[str, Any], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an entry once for each of the seeds of the row that it comes from."""
    label, seeds = entry.get("label"), row["seeds"]
    if not isinstance(seeds, list) or not seeds or any(type(s) is not int or s < 0 for s in seeds):
        raise UserError(f"row {label}: seeds is {seeds!r}; give a list of whole numbers from 0, such as [1234, 7, 99]")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"row {label}: a seed is listed twice; list it once")
    base = entry.get("weights_from")
    return [
        {
            **entry,
            **({} if base is None else {"weights_from": f"{base} seed {seed}"}),
            "label": f"{label} seed {seed}",
            "options": f"{entry.get('options') or ''} --cali_seed {seed}",
            "own_recording": True,
            "group": label,
        }
        for seed in seeds
    ]


def _axes(grid: Any, label: Any) -> dict[str, list[str | int | float]]:
    """Check the grid and return it."""
    if not isinstance(grid, dict) or not grid:
        raise UserError(f"grid {label}: {grid!r} is not a mapping of names to lists of values; {_EXAMPLE}")
    for name, values in grid.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"grid {label}: {name!r} cannot be a name in braces; {_EXAMPLE}")
        if not isinstance(values, list) or not values:
            raise UserError(f"grid {label}: {name} is {values!r}, which is not a list of values; {_EXAMPLE}")
        for value in values:
            # YAML reads yes, no, on and off as booleans, which no option takes.
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise UserError(f"grid {label}: {name} has {value!r}, which is neither a number nor text; correct it")
    return grid


def _fill(text: str, names: dict[str, Any], label: Any, key: str) -> str:
    try:
        return text.format(**names)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        known = ", ".join(f"{{{name}}}" for name in names)
        raise UserError(
            f"grid {label}: {key} {text!r} has braces around something other than {known}; correct it"
        ) from None
