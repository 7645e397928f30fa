"""Samples given on a command line, with the manifest of the run that made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdiff.cli.run_manifest import Manifest, read_manifest
from qdiff.evaluation.image_sets import ImageSet
from qdiff.evaluation.run_images import images_at


class Samples:
    """Images given by a path: a folder, a run folder, or a .npz file.

    Attributes:
        path: the given path.
        images: the images.
        manifest: run.json of the run that made them; an empty manifest if there is none.

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
            self.manifest = read_manifest(file, "remove it or restore it")

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest.config

    def about(self) -> dict[str, Any]:
        """Return a description of the samples for the JSON output."""
        kept = {k: self.config[k] for k in ("script", "method", "seed", "sampler", "ptq") if k in self.config}
        return {"path": str(self.path), "images": len(self.images), **({"run": kept} if kept else {})}
