"""The table of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdiff.benchmark.machine import machine_text
from qdiff.benchmark.timing import Spread
from qdiff.io.files import written_whole
from qdiff.io.markdown import markdown_table

NONE = "–"


@dataclass
class VariantRow:
    """The measurements of a variant; None if not measured.

    Attributes:
        seconds: seconds per turn.
        calls: network calls per turn.
        images_per_s: images per second of whole samplings.
        ratio: seconds of `qdiff.benchmark.variants.BASE` divided by these, turn by turn.
        own_ratio: seconds of the runtime's own float variant divided by these, turn by turn.
        kept, peak: resident bytes of a fresh process after its first turn, and their peak; both without ``imports``.
        imports: resident bytes of the process after its imports.
        file_bytes: bytes of the file that it loads.
        note: why there are no numbers; "" if there are.
    """

    variant: str
    seconds: Spread | None = None
    calls: int | None = None
    images_per_s: float | None = None
    ratio: Spread | None = None
    own_ratio: Spread | None = None
    kept: int | None = None
    peak: int | None = None
    imports: int | None = None
    file_bytes: int | None = None
    note: str = ""


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"  # avoids 1.23e+03


def _turn(row: VariantRow) -> str:
    if row.seconds is None:
        return NONE
    unit, factor = ("s", 1) if row.seconds.middle >= 1 else ("ms", 1000)
    return f"{_spread(row.seconds, lambda value: _digits(value * factor))} {unit}"


def _call(row: VariantRow) -> str:
    return NONE if row.seconds is None else f"{_digits(row.seconds.middle / row.calls * 1000)} ms"


def _ratio(spread: Spread | None) -> str:
    return NONE if spread is None else _spread(spread, "{:.2f}".format)


def _spread(spread: Spread, text: Callable[[float], str]) -> str:
    around = "" if spread.low == spread.high else f" ({text(spread.low)}–{text(spread.high)})"
    return text(spread.middle) + around


def _megabytes(value: int | None, digits: int) -> str:
    return NONE if value is None else f"{value / 1e6:.{digits}f} MB"


def _columns(measure: str, timed: bool) -> dict[str, Callable[[VariantRow], str]]:
    times = {
        "time per batch ↓": _turn,
        "time per call ↓": _call,
        "images/s ↑": lambda row: NONE if row.images_per_s is None else _digits(row.images_per_s),
        "× float ↑": lambda row: _ratio(row.ratio),
        "× own float ↑": lambda row: _ratio(row.own_ratio),
    }
    if measure != "sampling":  # one call samples no images
        times["time per call ↓"] = _turn
        del times["time per batch ↓"], times["images/s ↑"]
    sizes = {
        "memory kept ↓": lambda row: _megabytes(row.kept, 0),
        "memory peak ↓": lambda row: _megabytes(row.peak, 0),
        "file ↓": lambda row: _megabytes(row.file_bytes, 2),
    }
    return {**(times if timed else {}), **sizes}


def markdown(rows: Sequence[VariantRow], about: dict[str, Any]) -> str:
    """Return the table and a line about the measurement, the machine and the command."""
    columns = _columns(about["measure"], about["repeats"] > 0)
    lines = []
    for row in rows:
        cells = [cell(row) for cell in columns.values()]
        if row.note:
            cells[0] = f"not measured: {row.note}"
        lines.append([row.variant, *cells])
    turn = f"batch {about['batch']}"
    if about["measure"] == "sampling":
        turn += f", whole samplings of {about['calls']} network calls without decoding"
    parts = [f"{about['model']}, {about['quant']}; {turn}"]
    if about["repeats"] == 1:
        parts.append("one turn each")
    elif about["repeats"] > 1:
        parts.append(
            f"medians of {about['repeats']} turns in alternation and ratios turn by turn, quartiles in brackets"
        )
    parts += [
        "memory: resident bytes of a fresh process beyond its imports, mapped files included",
        machine_text(about["machine"]),
        about["date"],
    ]
    return f"{markdown_table(lines, ['variant', *columns])}\n\n{'; '.join(parts)}: `{about['command']}`"


def write_json(path: str | Path, rows: Sequence[VariantRow], about: dict[str, Any]) -> None:
    """Write the measurements as JSON (an atomic write)."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
