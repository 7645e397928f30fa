"""Runs of real digits that stand in for samples, and tables of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qdiff.cli.table import TableRun
from qdiff.cli.table_file import TableFile
from qdiff.io.images import save_png

COUNT = 20
QUANTIZED = "--ptq --weight_bit 4"


class DigitTable:
    """A table of a latent config, whose sampling command writes digits.

    Attributes:
        labels: folder of a row → ``labels`` of its run.json; rows without an entry have no such key.
        changed: folder of a row → what is added to its images, which are float's without it.
        commands: what was called, ("sample", folder) or ("record", file).
    """

    def __init__(self, folder: Path, images: np.ndarray) -> None:
        self.folder, self.images, self.out = folder, images, folder / "out"
        self.labels: dict[str, Any] = {}
        self.changed: dict[str, int] = {}
        self.commands: list[tuple[str, str]] = []
        self.config = folder / "models" / "ldm" / "digits" / "config.yaml"
        self.config.parent.mkdir(parents=True)
        pretrained = {"extractor": "digits-classifier", "reference": "models/digits32_reference.npz"}
        self.config.write_text(yaml.safe_dump({"model": {"target": "ldm.x", "params": {}}, "pretrained": pretrained}))
        (folder / "weights").write_bytes(b"weights")

    def file(self, rows: list[dict[str, Any]], **changes: Any) -> TableFile:
        spec = {"title": "T", "config": str(self.config), "script": "s.py", "options": "--n 1", "rows": rows, **changes}
        path = self.folder / "t.yaml"
        path.write_text(yaml.safe_dump(spec))
        return TableFile(path, self.out)

    def run(
        self,
        rows: list[dict[str, Any]],
        named: str | None = None,
        force: bool = False,
        results: Path | None = None,
        **changes: Any,
    ) -> dict:
        """Run the table and return its rows by label, as table.json has them."""
        self.commands.clear()
        TableRun(self.file(rows, **changes), rows=named, force=force, results=results).run()
        return {row["label"]: row for row in json.loads((self.out / "table.json").read_text())["rows"]}

    def text(self) -> str:
        return (self.out / "table.md").read_text()

    def cells(self, label: str) -> dict[str, str]:
        """Return a row of table.md: heading → cell."""
        lines = [line[2:-2].split(" | ") for line in self.text().splitlines() if line.startswith("| ")]
        return dict(zip(lines[0], next(line for line in lines if line[0] == label), strict=True))

    def call(self, command: list[str]) -> None:
        """Stand in for the sampling command and the recording command."""
        if "--out" in command:
            file = Path(command[command.index("--out") + 1])
            self.commands.append(("record", file.name))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            return
        folder = Path(command[command.index("-l") + 1])
        self.commands.append(("sample", folder.name))
        images = np.clip(self.images.astype(int) + self.changed.get(folder.name, 0), 0, 255).astype(np.uint8)
        manifest = {"command": shlex.join(["python", *command]), "files": {}}
        manifest["files"]["float weights"] = {"path": str(self.folder / "weights"), "sha256": "0" * 64}
        if folder.name in self.labels:
            manifest["labels"] = self.labels[folder.name]
        write_run(folder, images, **manifest)


def write_run(folder: Path, images: np.ndarray, **manifest: Any) -> None:
    """Write a finished run's folder; images that are there already are left alone."""
    for i, image in enumerate(images):
        if not (path := folder / "img" / f"{i:05d}.png").is_file():
            save_png(image, path)
    usual = {
        "config": {"seed": 0, "sampler": "plms"},
        "num_images": len(images),
        "status": "finished",
        "packages": {},
        "machine": {"cpus": 2},
        "seconds": {"sampling": 1.0},
        "cost": {"size_bytes": 1_500_000, "bops": 2.5e9},
    }
    (folder / "run.json").write_text(json.dumps(usual | manifest))
