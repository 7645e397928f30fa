"""Find or download a data set of :data:`qdiff.evaluation.datasets.DATASETS`, open its images, make its statistics.

Nothing is downloaded unless asked for, and downloads are checked against a published checksum if there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.evaluation.datasets import Dataset, find_dataset
from qdiff.evaluation.image_sets import ArrayImages, FirstImages, FolderImages, ImageSet, NpzImages
from qdiff.evaluation.lmdb_images import LmdbImages
from qdiff.evaluation.reference import ReferenceStatistics, compute_reference, load_reference
from qdiff.io import files
from qdiff.io.downloads import download
from qdiff.io.progress import tracked


def locate(name: str, option: str | None = None, path: Path | None = None, fetch: bool = False) -> tuple[str, Path]:
    """Return how to read a data set (an option's name) and from which path.

    Args:
        name: a key of :data:`DATASETS`.
        option: "images", "lmdb" or "npz"; None for an earlier download in the cache.
        path: the path given with that option.
        fetch: download the data set if no option is given and it is not in the cache.

    Raises:
        UserError: the option does not fit the data set; the data set is missing and ``fetch`` is False; or the download
            failed.
    """
    dataset = find_dataset(name)
    offered = " or ".join(f"--{o}" for o in dataset.options)
    if option is not None:
        if option not in dataset.options:
            raise UserError(f"{name} cannot be read from --{option}; give it with {offered}")
        return option, path
    if not dataset.cached.exists():
        if not fetch:
            raise UserError(
                f"the images of {name} are not at {dataset.cached}; give the path of yours with {offered}, or give "
                f"--download to download {dataset.where_to_get()}"
            )
        fetch_dataset(dataset)
    return dataset.options[0], dataset.cached


def fetch_dataset(dataset: Dataset) -> None:
    """Download a data set to ``dataset.cached``, check and unpack it; an interruption leaves no partial result.

    Raises:
        UserError: it cannot be downloaded, its checksum is wrong, or it cannot be unpacked.
    """
    if dataset.file.exists():  # downloaded by hand, or unpacking was interrupted
        for kind, expected, measure in (("MD5", dataset.md5, files.md5), ("SHA-256", dataset.sha256, files.sha256)):
            if expected is not None and measure(dataset.file) != expected:
                raise UserError(
                    f"{dataset.file} has a wrong {kind} (expected {expected}); delete it and repeat the command to "
                    "download it again"
                )
    else:
        offered = " or ".join(f"--{option}" for option in dataset.options)
        otherwise = f", or give the path of your images with {offered}"
        download(dataset.url, dataset.file, dataset.md5, otherwise, sha256=dataset.sha256)
        if dataset.md5 is None and dataset.sha256 is None:
            print(
                f"no published checksum is known for {dataset.file.name}; the SHA-256 of the download is "
                f"{files.sha256(dataset.file)}",
                file=sys.stderr,
            )
    if dataset.unpacks_to is not None:
        _unpack(dataset.file, dataset.cached)
        dataset.file.unlink()  # do not keep 43 GB twice


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the folder named as ``folder`` from a .zip to ``folder``; an interruption leaves no partial result."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(archive) as opened:
            for member in tracked(opened.infolist(), f"unpacking {archive.name}", "file"):
                opened.extract(member, temporary)
        os.replace(temporary / folder.name, folder)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        raise UserError(
            f"{archive} cannot be unpacked to {folder} ({error}); free some space, or delete the file and download it "
            "again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_dataset(name: str, option: str, path: Path, most: int | None = None) -> ImageSet:
    """Return the images of a data set, prepared as for published numbers.

    Args:
        name: a key of :data:`DATASETS`.
        option, path: from :func:`locate`.
        most: take only this many of the first images; None takes all.

    Raises:
        UserError: there are no readable images, or they have another size.
    """
    dataset = find_dataset(name)
    if option == "npz":
        images: ImageSet = NpzImages(path)
    elif option == "lmdb":
        images = LmdbImages(path, dataset.prepare)
    elif name == "cifar10" and (batches := _cifar10_batches(path)) is not None:
        images = ArrayImages(batches)
    else:
        images = FolderImages(path, dataset.prepare, recursive=True)
    if most is not None and most < len(images):
        images = FirstImages(images, most)
    with contextlib.closing(images.batches(1)) as batches:
        height, width = next(batches).shape[2:]
    if (height, width) != (dataset.sides, dataset.sides):
        raise UserError(
            f"the images of {path} are {width}×{height} pixels, those of {name} are {dataset.sides}×{dataset.sides}; "
            "give the images as published"
        )
    return images


def _cifar10_batches(path: Path) -> Tensor | None:
    """Read CIFAR-10's five training batches, uint8 [50000, 3, 32, 32]; None if ``path`` is a folder of images.

    Args:
        path: the .tar.gz, the folder ``cifar-10-batches-py``, or its parent folder.
    """
    from torchvision.datasets import CIFAR10

    parts = []
    for file, md5 in CIFAR10.train_list:
        data = _read_member(path, CIFAR10.base_folder, file)
        if data is None:
            if parts or path.is_file():
                raise UserError(f"{path} has no file {file} of CIFAR-10; download {CIFAR10.url} again")
            return None
        # Checked before unpickling, because a pickle can run code.
        if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"{file} of {path} has a wrong MD5 (CIFAR-10's is {md5}); download {CIFAR10.url} again")
        parts.append(np.asarray(pickle.loads(data, encoding="latin1")["data"], dtype=np.uint8))
    return torch.from_numpy(np.concatenate(parts).reshape(-1, 3, 32, 32))


def _read_member(path: Path, folder: str, file: str) -> bytes | None:
    """Return the bytes of ``file`` in a .tar.gz or a folder; None if there is no such file."""
    if path.is_file():
        try:
            with tarfile.open(path, "r:gz") as archive:
                return archive.extractfile(f"{folder}/{file}").read()
        except KeyError:
            return None
        except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
            raise UserError(f"{path} is not a readable archive of CIFAR-10 ({error}); download it again") from error
    found = next((p for p in (path / file, path / folder / file) if p.is_file()), None)
    return None if found is None else found.read_bytes()


def dataset_reference(
    name: str,
    path: Path,
    images: ImageSet,
    title: str,
    extractor: nn.Module,
    batch_size: int | None = None,
    progress: bool = True,
) -> ReferenceStatistics:
    """Make the statistics of a data set.

    ADM's reference batch contains mean and covariance of the whole training set, which published numbers are measured
    against; its 10,000 images provide the features for KID, precision and recall.

    Args:
        name: a key of :data:`~qdiff.evaluation.datasets.DATASETS`.
        path: the path that ``images`` were opened from.
        title: readable description of the images.
        extractor, batch_size, progress: see `compute_reference`.

    Raises:
        UserError: the statistics are missing in the reference batch, or were made with another extractor.
    """
    published = load_reference(path, extractor) if find_dataset(name).brings_statistics else None
    made = compute_reference(images, extractor, title, batch_size, progress)
    if published is None:
        return made
    return dataclasses.replace(made, gaussian=published.gaussian, spatial=published.spatial)
