"""Open images by a path that a user gives: a folder, a run folder, or a .npz file."""

from __future__ import annotations

import sys
from pathlib import Path

from qdiff.evaluation.image_files import check_single_run
from qdiff.evaluation.image_sets import FolderImages, ImageSet, open_images


def images_at(path: Path) -> ImageSet:
    """Return the images at a path; for a run folder, those in its ``img``.

    The number of images in subfolders that are not in the set is printed to stderr.

    Raises:
        UserError: as `open_images`, or the path is a folder of runs, or a run folder without images.
    """
    inside = path / "img"
    if path.is_dir() and not inside.is_dir():
        check_single_run(path)
    images = open_images(inside if inside.is_dir() else path)
    if isinstance(images, FolderImages) and images.left_out:
        count, rest = len(images), images.left_out
        print(f"{path}: using the {count} images directly in it, not the {rest} in folders below", file=sys.stderr)
    return images
