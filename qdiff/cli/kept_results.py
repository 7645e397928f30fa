"""Results of a table's rows that outlive their run folders: numbers as JSON, first images as one picture.

A row that was measured once, with the same options and by the same protocol, need not be run again, on another machine
either. The files are small enough to be committed (docs/leaderboard).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qdiff.cli.run_manifest import FLOAT_WEIGHTS, Manifest
from qdiff.cli.table_file import TableFile, TableRow, without
from qdiff.errors import UserError, first_line
from qdiff.io.files import check_writable, written_whole
from qdiff.io.images import load_png, png_shape, save_png
from qdiff.report.columns import COSTS, metric_columns

VERSION = 1
IMAGES = 8  # per row; a page of several tables shows as many


@dataclass(frozen=True)
class KeptRow:
    """What is kept of one row.

    Attributes:
        command: the commands that made it (of the row that it takes weights from, and its own), without the device and
            with ``OUT`` for the folder of the runs.
        measured_by: what identifies the protocol, see `qdiff.cli.measure.Measuring.by`.
        run: the entries of the run's manifest that a table's protocol tells.
        result: numbers as in `qdiff.report.columns`.
        metrics: the table's metrics; None, of a row that was kept without them, fits any table.
    """

    command: list[list[str]]
    measured_by: dict[str, Any]
    run: dict[str, Any]
    result: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] | None = None


class KeptResults:
    """The kept rows of a table: ``<name of the table>.json`` in a folder, and a picture of each row beside it.

    Args:
        folder: the folder; may not exist yet.
        table: the table.
        measured_by: the present protocol.

    Raises:
        UserError: the file or a picture is damaged, the file has a later version, or cannot be written.
    """

    def __init__(self, folder: str | Path, table: TableFile, measured_by: dict[str, Any]) -> None:
        self.table, self.measured_by = table, measured_by
        self.file = Path(folder) / f"{table.path.stem}.json"
        self.pictures = Path(folder) / table.path.stem
        check_writable(self.file)
        self._rows = self._read()
        for row in table.rows:
            if self.find(row) is not None and self._picture(row.label).is_file():
                self._kept_images(row.label)  # an error now, not when all rows are run

    def _read(self) -> dict[str, KeptRow]:
        if not self.file.is_file():
            return {}
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            if found["version"] > VERSION:
                raise ValueError(f"version {found['version']}")
            rows = {label: KeptRow(**row) for label, row in found["rows"].items()}
            for row in rows.values():
                _check(row)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.file} holds no kept results ({first_line(error)}); correct it, or delete it to run all again"
            ) from error
        return rows

    def find(self, row: TableRow) -> KeptRow | None:
        """Return what is kept of a row, if it was made with the table's present options and protocol."""
        kept = self._rows.get(row.label)
        fits = kept is not None and kept.command == self._command(row) and kept.measured_by == self.measured_by
        return kept if fits and set(self.table.metrics) <= set(kept.metrics or self.table.metrics) else None

    def keep(self, row: TableRow, result: dict[str, Any], manifest: Manifest, picture: bool) -> None:
        """Keep a row that was just measured; the same numbers again change nothing.

        Args:
            result: its numbers.
            manifest: of its run.
            picture: whether to keep the first images too.

        Raises:
            UserError: other rows were made of other float weights.
        """
        kept = KeptRow(
            self._command(row),
            self.measured_by,
            {
                "config": {key: manifest.config.get(key) for key in ("seed", "sampler")},
                "files": {
                    role: {"sha256": entry["sha256"]} for role, entry in manifest.files.items() if role == FLOAT_WEIGHTS
                },
            },
            {key: value for key, value in result.items() if key not in ("command", "published", "flags")},
            list(self.table.metrics),
        )
        self._check_weights(row.label, manifest.weights_hash)
        if picture:
            self._keep_picture(row.label, min(IMAGES, result["images"]))
        kept = KeptRow(**json.loads(json.dumps(asdict(kept))))  # as it is read
        if kept == self._rows.get(row.label):
            return
        self._rows = {**self._read(), row.label: kept}  # another process may have kept other rows meanwhile
        rows = {r.label: asdict(self._rows[r.label]) for r in self.table.rows if r.label in self._rows}
        with written_whole(self.file) as temporary:
            temporary.write_text(json.dumps({"version": VERSION, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    def _check_weights(self, label: str, own: str | None) -> None:
        for other, row in self._rows.items():
            theirs = Manifest(**row.run).weights_hash
            if other != label and own is not None and theirs not in (None, own):
                raise UserError(
                    f"row {label} was made of the float weights {own[:12]}, but row {other} in {self.file} of "
                    f"{theirs[:12]}; delete that file to run all rows again, or give another --results"
                )

    def _keep_picture(self, label: str, number: int) -> None:
        images, picture = self.table.folder(label) / "img", self._picture(label)
        beside = np.concatenate([load_png(images / f"{i:05d}.png") for i in range(number)], axis=1)
        if not picture.is_file() or not np.array_equal(load_png(picture), beside):
            save_png(beside, picture)

    def restore_picture(self, row: TableRow) -> None:
        """Unpack the kept images to `TableFile.images`, unless the row's own are there."""
        folder = self.table.kept_images(row.label)
        if not self._picture(row.label).is_file() or self.table.images(row.label) != folder:
            return
        for i, image in enumerate(self._kept_images(row.label)):
            save_png(image, folder / f"{i:05d}.png")

    def _kept_images(self, label: str) -> list[np.ndarray]:
        picture, number = self._picture(label), min(IMAGES, self._rows[label].result["images"])
        shape = png_shape(picture)
        if shape is None or shape[1] % number != 0:
            raise UserError(
                f"{picture} is not the kept picture of {number} images; delete it to show the row without images, or "
                "get it again"
            )
        return np.split(load_png(picture), number, axis=1)

    def _picture(self, label: str) -> Path:
        return self.pictures / f"{self.table.folder(label).name}.png"

    def _command(self, row: TableRow) -> list[list[str]]:
        commands, out = [], str(self.table.out)
        base = self.table.base(row)
        for made in ([] if base is None else [base]) + [row]:
            words = without(self.table.command(made, None), ["-l"])
            inside = [word == out or word.startswith(f"{out}/") for word in words]
            commands.append([f"OUT{w.removeprefix(out)}" if i else w for w, i in zip(words, inside, strict=True)])
        return commands


def _check(row: KeptRow) -> None:
    """Raise an error of Python's own for values that a table could not show."""
    manifest, result = Manifest(**row.run), row.result
    _ = manifest.config["seed"], manifest.config["sampler"], [entry["sha256"] for entry in manifest.files.values()]
    if not (isinstance(result["images"], int) and result["images"] > 0):
        raise ValueError(f"images {result['images']}")
    for key in ("label", "method", "machine", "date"):
        if not isinstance(result[key], str):
            raise TypeError(f"{key} {result[key]}")
    for key in (column.key for column in (*metric_columns(), *COSTS)):
        if not isinstance(result.get(key), int | float | None):
            raise TypeError(f"{key} {result[key]}")
