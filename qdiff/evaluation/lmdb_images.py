"""Images of an LMDB in LSUN's published form: key → bytes of one encoded image."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.evaluation.image_sets import ImageSet, Prepare, read_rgb

HASHED_AT_EACH_END = 16


class LmdbImages(ImageSet):
    """Every entry of an LMDB, in the order of their keys (bytes compared from the left).

    Args:
        path: the folder that contains ``data.mdb``, or that file.
        prepare: applied to every image (a Pillow image in RGB), e.g. a crop.

    Raises:
        UserError: the package lmdb is missing, there is no LMDB, or it is empty.
    """

    def __init__(self, path: Path, prepare: Prepare | None = None) -> None:
        try:
            import lmdb
        except ImportError as error:
            raise UserError(
                f"reading {path} needs the package lmdb, which cannot be imported here ({error}); "
                "install it with 'pip install \".[lmdb]\"'"
            ) from error
        self.path, self.prepare = path, prepare
        self.file = path / "data.mdb" if path.is_dir() else path
        if not self.file.is_file():
            raise UserError(f"there is no LMDB at {path}; give the folder that holds its data.mdb (unzip it first)")
        try:
            # One environment for this object's lifetime, because a process must not open a file twice. No lock file is
            # written, because data sets are often on read-only disks.
            self.environment = lmdb.open(str(self.file), subdir=False, readonly=True, lock=False)
            self.count = self.environment.stat()["entries"]
            whole = (self.environment.info()["last_pgno"] + 1) * self.environment.stat()["psize"]
        except lmdb.Error as error:
            raise UserError(
                f"{self.file} cannot be opened as an LMDB ({error}); download it again, or unpack it completely"
            ) from error
        if self.file.stat().st_size < whole:  # reading beyond the end would kill the process
            raise UserError(f"the LMDB {self.file} is truncated; download it again, or unpack it completely")
        if self.count == 0:
            raise UserError(f"the LMDB {self.file} is empty; give one that holds images")

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        size = None
        # This also ends the transaction of a generator that is not exhausted.
        with self.environment.begin() as transaction, transaction.cursor() as cursor, ThreadPoolExecutor() as pool:
            entries = self._entries(cursor)
            while some := list(itertools.islice(entries, batch_size)):
                images = list(pool.map(self._read, some))
                size = size or images[0].shape
                for (key, _), image in zip(some, images, strict=True):
                    if image.shape != size:
                        raise UserError(
                            f"{self._name(key)} is {image.shape[1]}×{image.shape[0]} pixels but those before it are "
                            f"{size[1]}×{size[0]}; metrics need images of one size"
                        )
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def _entries(self, cursor) -> Iterator[tuple[bytes, bytes]]:
        import lmdb

        try:
            yield from cursor
        except lmdb.Error as error:
            raise UserError(f"{self.file} cannot be read to its end ({error}); download it again") from error

    def _read(self, entry: tuple[bytes, bytes]) -> np.ndarray:
        key, data = entry
        return read_rgb(io.BytesIO(data), self._name(key), self.prepare)

    def _name(self, key: bytes) -> str:
        return f"the entry {key.decode(errors='replace')!r} of {self.path}"

    def fingerprint(self) -> str:
        """Return a hash of the number of entries, the file's size, and the first and last few entries.

        LSUN bedroom has 43 GB, too much to read for a hash. A file that was cut, extended or replaced by another
        category gets another hash; a file changed in the middle does not.
        """
        about = (self.prepare, self.count, self.file.stat().st_size)
        digest = hashlib.sha256(repr(about).encode())
        with self.environment.begin() as transaction, transaction.cursor() as cursor:
            cursor.first()
            ends = [*itertools.islice(cursor, HASHED_AT_EACH_END)]
            cursor.last()
            ends += itertools.islice(cursor.iterprev(), HASHED_AT_EACH_END)
        for key, data in ends:
            digest.update(hashlib.sha256(key).digest() + hashlib.sha256(data).digest())
        return digest.hexdigest()
