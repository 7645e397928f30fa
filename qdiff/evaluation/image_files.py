"""Find the image files of a folder."""

from __future__ import annotations

import os
from pathlib import Path

from qdiff.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_files(folder: Path) -> list[Path]:
    """Return the images directly in a folder, sorted by name; hidden files and files of other types are left out."""
    return sorted(folder / name for name in _names(folder) if _is_image(name))


def image_files_below(folder: Path) -> list[Path]:
    """Return the images of a folder and its subfolders, sorted by path.

    Links to folders are followed, each folder once; hidden folders are left out.

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a parent, or a second link to the same folder
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(place) / name for name in names if _is_image(name)]
    return sorted(found)


def check_single_run(folder: Path) -> None:
    """Raise a `UserError` for a folder of runs, or of a run without images: other pictures would be taken for images.

    Args:
        folder: a folder without ``img`` that was given as a set of images.
    """
    if (folder / "run.json").is_file():
        raise UserError(
            f"{folder} is a run folder without images (--skip_save, or none are made yet); repeat its "
            "command without --skip_save in another folder"
        )
    if image_files(folder):
        return
    runs = sorted(p.parent.name for p in folder.glob("*/run.json"))
    if runs:
        raise UserError(
            f"{folder} holds {len(runs)} run folders, not one set of images; give one of them, e.g. {runs[0]}"
        )


def _names(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if not entry.is_dir()]


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
