"""Atomic writes: write under a temporary name, then rename, so a file is complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from qdiff.errors import UserError

# Exceptions raised by reading a damaged .npz file, or a file of another kind; zipfile, zlib, np.load and json each
# raise their own.
DAMAGED_NPZ = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; it is renamed to ``path`` when the block ends without an error.

    The file gets the permissions of any new file there (the user's umask), whatever the writer set: safetensors, for
    example, makes its files readable by their owner only.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps concurrent writers in one folder apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    mode = _mode_of_new_file(temporary)
    try:
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _mode_of_new_file(path: Path) -> int:
    """Return the permissions that a new file gets at ``path``; reading the umask would change it for a moment."""
    try:
        with path.open("wb") as file:
            return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    finally:
        path.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise a `UserError` now if ``path`` could not be written later."""
    path = Path(path)
    if path.is_dir() or not _can_be_made(path):
        raise UserError(f"{path} cannot be written; choose a file in a folder with write permission")


def _can_be_made(path: Path) -> bool:
    folder = next((p for p in path.absolute().parents if p.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=folder):  # permissions do not suffice: root, read-only mounts, /proc
            return True
    except OSError:
        return False


@contextlib.contextmanager
def folder_written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a new folder next to ``path``; it is renamed to ``path`` when the block ends without an error.

    ``path`` must be missing or an empty folder (`check_new_folder`). As with `written_whole`, files get the permissions
    of new ones.
    """
    path = Path(path).resolve()  # what a link leads to is replaced, not the link
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.mkdir()
    try:
        yield temporary
        mode = _mode_of_new_file(temporary / "new")
        for file in temporary.rglob("*"):
            if file.is_file() and stat.S_IMODE(file.stat().st_mode) != mode:
                file.chmod(mode)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(path: str | Path) -> None:
    """Raise a `UserError` now if `folder_written_whole` would fail: ``path`` is not empty, or cannot be replaced."""
    path = Path(path)
    if os.path.ismount(path.resolve()):
        raise UserError(f"{path} is a mount point, which cannot be replaced whole; choose a new folder inside it")
    is_empty = path.is_dir() and not any(path.iterdir())
    if not is_empty and (path.exists() or path.is_symlink()):
        raise UserError(f"{path} exists and is not an empty folder; choose another folder, or delete it")
    if not _can_be_made(path.resolve()):
        raise UserError(f"{path} cannot be written; choose a folder inside one with write permission")


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    return _hexdigest(path, hashlib.sha256())


def md5(path: str | Path) -> str:
    """Return the hexadecimal MD5 of a file (released checkpoints are published with one; it is no security measure)."""
    return _hexdigest(path, hashlib.md5(usedforsecurity=False))


def _hexdigest(path: str | Path, digest) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
