"""The folder of one run: manifest, log, images; repeating the command continues it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from qdiff.cli.run_config import CYCLED, differences
from qdiff.cli.run_manifest import Manifest, read_manifest
from qdiff.errors import UserError
from qdiff.io.files import check_writable, sha256, written_whole
from qdiff.io.images import grid, load_png, png_shape, save_png
from qdiff.machine.cpu import cpu_text

log = logging.getLogger("qdiff")

PACKAGES = ("torch", "torchvision", "numpy", "pytorch-lightning", "safetensors", "torch-fidelity")
PREVIEW_IMAGES = 64


class RunFolder:
    """``run.json``, ``run.log``, ``img/00000.png`` …, ``grid.png``.

    Args:
        path: the folder.
        config: the resolved configuration, JSON values: everything that decides the images. A run is continued only
            with the same configuration, or with one that asks for more images (`qdiff.cli.run_config`).
        count: number of images to make.

    Attributes:
        path, count, config: as given.
        images: the folder of the images.
        manifest: ``run.json``.
        images_discarded: the run is finished, and its images were deleted as asked.
        image_shape: (H, W, C) of its images; None until one is made.

    Raises:
        UserError: the folder cannot be written, or holds another run.
    """

    def __init__(self, path: str | Path, config: dict[str, Any], count: int) -> None:
        self.path, self.count = Path(path), count
        self.images = self.path / "img"
        check_writable(self.path / "run.json")
        self.config = json.loads(json.dumps(config))
        # From the inside out.
        self._new_folders = [folder for folder in (self.path, *self.path.parents) if not folder.is_dir()]
        self._was_empty = bool(self._new_folders) or _is_empty(self.path)
        self.manifest = self._previous() or Manifest(self.config)
        # The images of any other run show whether it is finished.
        self.images_discarded = self.manifest.status == "finished" and self.manifest.images_kept is False
        if self.images_discarded and self.manifest.num_images not in (None, count):
            raise UserError(
                f"{self.path} holds a finished run whose {self.manifest.num_images} images were deleted; choose "
                "another --logdir to make more"
            )
        self.manifest.config, self.manifest.num_images, self.manifest.status = self.config, count, "running"
        self.manifest.command = shlex.join([Path(sys.executable).name, *sys.argv])
        self.manifest.packages = installed_versions(PACKAGES)
        self.manifest.machine = {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "cpu": cpu_text(),
        }
        shape = self.manifest.image_shape
        self.image_shape: tuple[int, ...] | None = None if shape is None else tuple(shape)

    def _previous(self) -> Manifest | None:
        file = self.path / "run.json"
        if not file.is_file():
            if self.images.is_dir() and any(self.images.iterdir()):
                raise UserError(f"{self.path} holds images but no run.json; choose another --logdir")
            return None
        previous = read_manifest(file, "choose another --logdir")
        # Calibration prompts are needed until the error of ε is measured, after calibration.
        is_calibrated = self.config.get("ptq") is None or previous.noise_error is not None
        differing = differences(previous.config, self.config, is_calibrated)
        if differing:
            raise UserError(
                f"{self.path} holds a run with other options ({', '.join(differing)}); repeat its command to "
                "continue it, or choose another --logdir"
            )
        if CYCLED in previous.config:  # the prompts that it was calibrated with
            self.config[CYCLED] = previous.config[CYCLED]
        return previous

    def open(self) -> None:
        """Create the folder and write the manifest for the first time."""
        try:
            self.images.mkdir(parents=True, exist_ok=True)
            self.save_manifest()
        except OSError as error:
            raise UserError(
                f"run folder {self.path} cannot be written ({error.strerror}); choose another --logdir"
            ) from None

    @contextlib.contextmanager
    def logged(self, shared: bool = False) -> Iterator[None]:
        """Also write log lines to ``run.log`` inside the block.

        A run in an empty folder that a `UserError` ends before it wrote anything else leaves it empty, so that the
        mended command finds no run with other options in its way.

        Args:
            shared: other processes write to the folder too, so that it stays as it is.
        """
        handler = logging.FileHandler(self.path / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        try:
            try:
                yield
            finally:
                log.removeHandler(handler)
                handler.close()
        except UserError:
            if self._was_empty and not shared:
                with contextlib.suppress(OSError):  # the refusal is what the user has to see
                    self._remove_if_unused()
            raise

    def _remove_if_unused(self) -> None:
        """Remove what `open` and `logged` wrote if there is nothing else, and nothing was measured."""
        written = {"run.json", "run.log", self.images.name}
        if self.manifest.noise_error is not None or {entry.name for entry in self.path.iterdir()} - written:
            return
        self.images.rmdir()  # an error if there are images
        for name in ("run.log", "run.json"):
            (self.path / name).unlink()
        for folder in self._new_folders:
            folder.rmdir()  # an error if another run has begun in it

    def save_manifest(self) -> None:
        self.manifest.write(self.path / "run.json")

    def add_file(self, role: str, path: str | Path) -> None:
        """Record the hash of a file that was read.

        Raises:
            UserError: the file has changed since earlier images of the run were made.
        """
        entry = {"path": str(path), "sha256": sha256(path)}
        if self.manifest.files.get(role, entry)["sha256"] != entry["sha256"]:
            raise UserError(
                f"{path} ({role}) has changed since the run in {self.path} began; put the file back, or choose another "
                "--logdir"
            )
        self.manifest.files[role] = entry

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the block's time to ``seconds`` and ``cpu_seconds`` (over all continuations of the run)."""
        started, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.manifest.add_seconds(what, time.perf_counter() - started, time.process_time() - cpu)

    def image_path(self, index: int) -> Path:
        return self.images / f"{index:05d}.png"

    def pending(self, rank: int = 0, processes: int = 1) -> list[int]:
        """Return the numbers of this process's images that do not exist yet."""
        return [i for i in range(rank, self.count, processes) if not self.image_path(i).is_file()]

    def damaged(self, rank: int = 0, processes: int = 1) -> list[int]:
        """Return the numbers of this process's existing images that must be made again.

        Their PNG files are damaged, or have another shape than the run's images: the shape in the manifest, or else
        the one that most images have.
        """
        there = [i for i in range(rank, self.count, processes) if self.image_path(i).is_file()]
        shapes = {i: png_shape(self.image_path(i)) for i in there}
        found = Counter(shape for shape in shapes.values() if shape is not None)
        usual = self.image_shape or (found.most_common(1)[0][0] if found else None)
        return [i for i, shape in shapes.items() if shape is None or shape != usual]

    def save_images(self, indices: list[int], images: np.ndarray) -> None:
        """Write uint8 images [N, H, W, C]; ``indices`` are their numbers."""
        self.image_shape = tuple(images.shape[1:])
        self.manifest.image_shape = list(self.image_shape)
        for index, image in zip(indices, images, strict=True):
            save_png(image, self.image_path(index))

    def load_images(self, count: int | None = None) -> np.ndarray:
        """Read the first ``count`` images (all by default), uint8 [N, H, W, C]."""
        return np.stack([load_png(self.image_path(i)) for i in range(count or self.count)])

    def finish(
        self, save_npz: bool, columns: int | None = None, write_grid: bool = True, keep_images: bool = True
    ) -> None:
        """Write the preview grid, the array file if asked for, and the manifest's final state.

        Args:
            columns: columns of the grid; None makes it about square.
            write_grid: False writes no grid.
            keep_images: False deletes the single images and keeps only the grid (and the array file).
        """
        if write_grid:
            first = self.load_images(min(PREVIEW_IMAGES, self.count))
            save_png(grid(first, columns, scale=max(1, 64 // first.shape[1])), self.path / "grid.png")
        if save_npz or (self.path / "samples.npz").is_file():  # after more images, an existing file is out of date
            with written_whole(self.path / "samples.npz") as temporary, open(temporary, "wb") as file:
                np.savez(file, arr_0=self.load_images())
        self.manifest.status = "finished"
        self.manifest.images_kept = keep_images
        self.save_manifest()
        if not keep_images:
            self.discard_images()

    def discard_images(self) -> None:
        shutil.rmtree(self.images, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:  # it may not be listed
        return False


def start_logging(verbose: bool) -> None:
    """Send log lines to stderr."""
    log.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of ``packages``, without those that are not installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
