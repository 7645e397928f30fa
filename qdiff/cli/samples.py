"""Samples as a command line names them, with what the run that made them says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdiff.cli.run_manifest import Manifest
from qdiff.errors import UserError
from qdiff.evaluation.image_sets import ImageSet
from qdiff.evaluation.run_images import images_at


class Samples:
    """Images that were given by a path: a folder, the folder of a run, or a .npz file.

    Attributes:
        path: as given.
        images: what they are.
        manifest: run.json of a run's folder, else of nothing.

    Raises:
        UserError: there are no usable images, or the manifest is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.images: ImageSet = images_at(self.path)
        self.manifest = Manifest({})
        is_run = (self.path / "img").is_dir()
        file = (self.path if is_run else self.path.parent) / "run.json"
        if file.is_file() and (is_run or self.path.name in ("img", "samples.npz")):
            try:
                self.manifest = Manifest.read(file)
            except ValueError as error:
                raise UserError(f"{file} is not a run's manifest ({error}); remove it or restore it") from error

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest.config

    def about(self) -> dict[str, Any]:
        """Return what is known of them, for the JSON."""
        kept = {k: self.config[k] for k in ("script", "method", "seed", "sampler", "ptq") if k in self.config}
        return {"path": str(self.path), "images": len(self.images), **({"run": kept} if kept else {})}
