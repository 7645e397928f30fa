"""Open images by a path that a user gives: a folder, the folder of a run, or a .npz file."""

from __future__ import annotations

import sys
from pathlib import Path

from qdiff.evaluation.image_files import check_single_run
from qdiff.evaluation.image_sets import FolderImages, ImageSet, open_images


def images_at(path: Path) -> ImageSet:
    """Return the images of a path; a run's are those in its ``img``.

    Images in folders below the named one, which are not in the set, are counted on stderr.

    Raises:
        UserError: as `open_images`, or it is a folder of runs, or of a run without images.
    """
    inside = path / "img"
    if path.is_dir() and not inside.is_dir():
        check_single_run(path)
    images = open_images(inside if inside.is_dir() else path)
    if isinstance(images, FolderImages) and images.left_out:
        count, rest = len(images), images.left_out
        print(f"{path}: the {count} images directly in it; not the {rest} in folders below", file=sys.stderr)
    return images
