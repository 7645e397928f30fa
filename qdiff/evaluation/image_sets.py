"""Sets of images for metrics: a folder, an array file, or an array, read batch by batch."""

from __future__ import annotations

import contextlib
import hashlib
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qdiff.errors import UserError
from qdiff.evaluation.image_files import SUFFIXES, image_files, image_files_below
from qdiff.io.files import DAMAGED_NPZ

ARRAY = "arr_0"  # NumPy's name for an unnamed array, as in ADM's files and in samples.npz
HASHED_AT_A_TIME = 256

Prepare = Callable[[Image.Image], Image.Image]


class ImageSet(ABC):
    """An ordered set of uint8 RGB images of one size; grey images are repeated in all three channels."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 [n, 3, H, W] on the CPU, n = ``batch_size`` except for the last batch.

        Raises:
            UserError: an image is unreadable, or has another size than the first.
        """

    def fingerprint(self) -> str:
        """Return a hash that identifies the source of the images; for files, it does not read the pixels."""
        return self.sha256()

    def sha256(self) -> str:
        """Return the SHA-256 of the pixels, in order; the same for a folder and an array of the same images."""
        digest = hashlib.sha256()
        for batch in self.batches(HASHED_AT_A_TIME):
            add_pixels(digest, batch)
        return digest.hexdigest()


def add_pixels(digest: Any, batch: Tensor) -> None:
    """Feed a batch [n, 3, H, W] to a hash, image by image, so that the hash does not depend on the batch size."""
    for image in batch:
        digest.update(f"{list(image.shape)}\n".encode())
        digest.update(image.contiguous().numpy().tobytes())


Images = str | Path | Tensor | np.ndarray | ImageSet


def open_images(images: Images) -> ImageSet:
    """Return the image set of a folder, a ``.npz`` file or an array; an image set is returned unchanged.

    Args:
        images: a folder (see `FolderImages`), a .npz file (`NpzImages`), or uint8 [N, H, W, C] or [N, C, H, W]
            with C 1 or 3.

    Raises:
        UserError: the file or folder is missing, holds no image, or has another dtype or shape.
    """
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str | Path):
        path = Path(images)
        return NpzImages(path) if path.suffix == ".npz" else FolderImages(path)
    return ArrayImages(torch.as_tensor(images))


class ArrayImages(ImageSet):
    """An array in memory: uint8 [N, H, W, C] or [N, C, H, W] with C 1 or 3."""

    def __init__(self, images: Tensor) -> None:
        self.array = _channels_first(images)

    def __len__(self) -> int:
        return len(self.array)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        for part in self.array.split(batch_size):
            yield part.cpu().expand(-1, 3, -1, -1)


class NpzImages(ImageSet):
    """``arr_0`` of a .npz file, uint8 [N, H, W, C], read batch by batch: ADM's files have up to 10 GB."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened_array(path) as (_, shape):
            self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        with _opened_array(self.path) as (file, (count, *shape)):
            for start in range(0, count, batch_size):
                size = min(batch_size, count - start)
                try:
                    data = bytearray(file.read(size * math.prod(shape)))
                except DAMAGED_NPZ as error:
                    raise UserError(f"{self.path} is damaged ({error}); download or make it again") from error
                if len(data) != size * math.prod(shape):
                    raise UserError(f"{self.path} ends in the middle of its images; download or make it again")
                yield _channels_first(torch.frombuffer(data, dtype=torch.uint8).view(size, *shape)).expand(
                    -1, 3, -1, -1
                )


def holds_images(path: Path) -> bool:
    """Whether a .npz file has an array of images (it may also hold statistics)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{ARRAY}.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


@contextlib.contextmanager
def _opened_array(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Yield the stream of ``arr_0``'s data, and its shape [N, H, W, C]."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; give an existing .npz file or a folder of images")
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
            file = stack.enter_context(archive.open(f"{ARRAY}.npy"))
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, by_columns, dtype = read(file)
        except DAMAGED_NPZ as error:
            raise UserError(
                f"{path} holds no array {ARRAY} of images ({error}); give a file written by numpy.savez "
                "with uint8 [N, H, W, 3]"
            ) from error
        if dtype != np.uint8 or by_columns or len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape:
            raise UserError(
                f"{ARRAY} of {path} is {dtype} {list(shape)}; images must be uint8 [N, H, W, C] with C 1 or 3"
            )
        yield file, shape


class FolderImages(ImageSet):
    """Image files of a folder, sorted by name.

    If there is no image directly in the folder, the images of its subfolders are used, sorted by path: ImageNet has one
    folder per class.

    Args:
        folder: the folder.
        prepare: applied to every image (a Pillow image in RGB), e.g. a crop.
        recursive: always include subfolders.

    Attributes:
        folder, prepare: as given.
        paths: paths of the images.
        left_out: number of images in subfolders that are not in the set.

    Raises:
        UserError: the folder does not exist, or has no image.
    """

    def __init__(self, folder: Path, prepare: Prepare | None = None, recursive: bool = False) -> None:
        if not folder.is_dir():
            raise UserError(f"there is no folder of images at {folder}; give one that holds PNG files")
        self.folder, self.prepare = folder, prepare
        try:
            everything = image_files_below(folder)
            self.paths = everything if recursive else image_files(folder) or everything
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be read ({error.strerror}); check its permissions") from None
        self.left_out = len(everything) - len(self.paths)
        if not self.paths:
            raise UserError(
                f"the folder {folder} and those below it hold no image ({', '.join(s[1:] for s in SUFFIXES)}); give "
                "the folder of the images"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        size = None
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            for start in range(0, len(self.paths), batch_size):
                paths = self.paths[start : start + batch_size]
                images = list(pool.map(self._read, paths))
                size = size or images[0].shape
                for path, image in zip(paths, images, strict=True):
                    if image.shape != size:
                        first = self.paths[0].relative_to(self.folder)
                        raise UserError(
                            f"{path} is {image.shape[1]}×{image.shape[0]} pixels but {first} is {size[1]}×{size[0]}; "
                            "metrics need images of one size"
                        )
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def _read(self, path: Path) -> np.ndarray:
        return read_rgb(path, path, self.prepare)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.prepare).encode() if self.prepare else b"")
        for path in self.paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


class FirstImages(ImageSet):
    """The first ``count`` images of a set."""

    def __init__(self, images: ImageSet, count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return min(self.count, len(self.images))

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        left = len(self)
        with contextlib.closing(self.images.batches(min(batch_size, left))) as batches:
            while left > 0:
                batch = next(batches)[:left]
                left -= len(batch)
                yield batch

    def fingerprint(self) -> str:
        return hashlib.sha256(f"first {self.count} of {self.images.fingerprint()}".encode()).hexdigest()


def read_rgb(file: Path | IO[bytes], name: object, prepare: Prepare | None = None) -> np.ndarray:
    """Read one image as uint8 [H, W, 3].

    Args:
        file: a path or an open stream.
        name: name of the image in errors.
        prepare: applied to the Pillow image in RGB.

    Raises:
        UserError: the file is not an image, or has 16 bits per channel.
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):  # convert("RGB") would clip 16 bits to 8, not scale them
                raise UserError(f"{name} has 16 bits per channel; metrics need PNG files with 8")
            image = image.convert("RGB")
            return np.asarray(image if prepare is None else prepare(image))
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # raised by Pillow for truncated files and other formats
        raise UserError(f"{name} is not a readable image ({error}); sample it again or remove it") from error


def _channels_first(images: Tensor) -> Tensor:
    """Return uint8 [N, C, H, W] of images with channels on either side."""
    if images.dtype != torch.uint8:
        raise UserError(f"images for metrics must be uint8, not {images.dtype}; clamp, scale to 0-255 and round first")
    first, last = (images.dim() == 4 and images.shape[side] in (1, 3) for side in (1, -1))
    if first == last or images.numel() == 0:
        raise UserError(
            "images for metrics must be [N, H, W, C] or [N, C, H, W] with C 1 or 3, not "
            f"{list(images.shape)}; bring the axes into one of these orders"
        )
    return images if first else images.permute(0, 3, 1, 2)
