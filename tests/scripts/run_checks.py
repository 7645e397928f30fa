"""What the script tests look at in a run folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image


def sha256(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def manifest(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def image_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "img").glob("*.png"))}


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted((folder / "img").glob("*.png"))]).astype(int)


def largest_difference(a: Path, b: Path) -> int:
    """Grey levels between the images of two run folders."""
    return int(np.abs(pixels(a) - pixels(b)).max())


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and content of every file but the manifest and the log, which tell of each call."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, sha256(p))
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("run.json", "run.log", "grid.png", "samples.npz")
    }


def lose_images(folder: Path, *numbers: int) -> None:
    """Leave a run folder as a kill while sampling leaves it."""
    for number in numbers:
        (folder / "img" / f"{number:05d}.png").unlink()
    (folder / "grid.png").unlink()
    (folder / "img" / f".{numbers[0]:05d}.png.4242.part").write_bytes(b"\x89PNG half an image")
    (folder / "run.json").write_text(json.dumps(manifest(folder) | {"status": "running"}))


def succeeded(outcome):
    assert outcome.code == 0, outcome.err
    return outcome
