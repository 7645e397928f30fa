"""Read ``torch.save`` files without running their code, explaining unreadable ones in one sentence; and write them."""

from __future__ import annotations

import io
import pickle
import pickletools
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import torch

from qdiff.errors import UserError
from qdiff.io.files import written_whole

BEFORE_1_6 = 0x1950A86A20F9469CFC6C  # the first pickle of such a file
LEADING = 3  # pickles before the object's: this number, the format's version, and sizes of the writer's types
ANEW = "if you trust it, open it once with torch.load(weights_only=False) and torch.save only its tensors"
WHOLE_MODULE = (
    "holds a whole nn.Module, which includes code; load it where its classes exist, and torch.save its state_dict()"
)
OBJECTS = f"holds objects that only code can make, and code in files is not run; {ANEW}"


def read_torch_file(path: Path, what: str = "checkpoint", fix: str = "get the file again", mapped_from: int = 1 << 28):
    """Return the contents of a ``torch.save`` file; objects that are not plain data become stand-ins (`_Inert`).

    Both formats can be read: archives, and the format before PyTorch 1.6.

    Args:
        what: the file's name in error messages.
        fix: the advice in error messages if it is damaged.
        mapped_from: archives of at least this many bytes are memory-mapped.

    Raises:
        UserError: the file is damaged, or intact but of a kind that cannot be read; the message says which.
    """
    try:
        return _load_inert(path, mapped_from)
    except Exception as error:  # the reader can raise anything for bytes that are not a pickle
        raise UserError(f"{what} {path} {_trouble(path, fix, error)}") from error


def write_torch_file(values: Any, path: str | Path) -> None:
    """``torch.save`` values with an atomic write; equal tensors give equal bytes.

    Given a path, ``torch.save`` would name the archive's folder after the temporary file.
    """
    with written_whole(path) as temporary, temporary.open("wb") as file:
        torch.save(values, file)


class _Inert:
    """Stand-in for a class that is not loaded.

    Its objects are `Counter`s: of the types that PyTorch's reader knows, this one accepts everything that a pickle may
        set on an object: items, attributes and slots.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Counter:
        return Counter()


class _Opaque:
    """Stand-in for a class whose objects have a state that is not a dict, such as numpy's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def is_module(value: Any) -> bool:
    """Whether a stand-in replaces a whole ``nn.Module``."""
    return isinstance(value, Counter) and {"_parameters", "_modules"} <= set(vars(value))


def _load_inert(path: Path, mapped_from: int) -> Any:
    zipped = zipfile.is_zipfile(path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path if zipped else _as_archive(_old_pickle(path)))
    mapped = zipped and path.stat().st_size >= mapped_from
    stand_ins = [(_Opaque if name.startswith("numpy.") else _Inert, name) for name in names]
    try:
        return _load(path, mapped, stand_ins)
    except TypeError:  # another class whose state is not a dict
        return _load(path, mapped, [(_Opaque, name) for name in names])


def _load(path: Path, mapped: bool, stand_ins: list[tuple[type, str]]) -> Any:
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _old_pickle(path: Path) -> bytes:
    """Return the object's pickle in a file from before PyTorch 1.6; the tensors' values follow it."""
    with open(path, "rb") as file:
        if _skip_pickle(file) != BEFORE_1_6:
            raise ValueError("not a torch.save file")
        for _ in range(LEADING - 1):
            _skip_pickle(file)
        start = file.tell()
        _skip_pickle(file)
        length = file.tell() - start
        file.seek(start)
        return file.read(length)


def _skip_pickle(file: BinaryIO) -> Any:
    """Read to the end of a pickle without executing its instructions; return the last argument."""
    last = None
    for _, argument, _ in pickletools.genops(file):
        last = last if argument is None else argument
    return last


def _as_archive(pickled: bytes) -> io.BytesIO:
    """Wrap a pickle in an archive like PyTorch's, for a function that inspects only archives."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    made.seek(0)
    return made


def _trouble(path: Path, fix: str, error: Exception) -> str:
    """Return what is wrong with a file that could not be loaded, and the fix."""
    try:
        if tarfile.is_tarfile(path):
            return f"is a tar archive, either of files or from torch.save before PyTorch 0.2; unpack it, or {ANEW}"
        if zipfile.is_zipfile(path):
            return _trouble_of_archive(path, fix)
        with open(path, "rb") as file:
            if _skip_pickle(file) != BEFORE_1_6:
                anew = ANEW.replace("torch.load(weights_only=False)", "pickle.load")
                return f"was written by pickle, not by torch.save; {anew}"
            for _ in range(LEADING - 1):
                _skip_pickle(file)
            if {"_parameters", "_modules"} <= {argument for _, argument, _ in pickletools.genops(file)}:
                return WHOLE_MODULE
            _skip_pickle(file)  # the keys of its tensors
        # The pickle is complete: either it is not plain data, or the values after it are truncated.
        return OBJECTS if isinstance(error, pickle.UnpicklingError) else f"is truncated; {fix}"
    except Exception:  # the pickle's instructions end too early
        return f"is damaged or truncated; {fix}"


def _trouble_of_archive(path: Path, fix: str) -> str:
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
        if archive.testzip() is not None:
            return f"is damaged; {fix}"
        if "data.pkl" not in names:
            return f"is a zip archive, but not one of torch.save; {fix}"
        if "constants.pkl" in names:
            return "is a TorchScript archive, which holds code; give a file of its state dict, saved by torch.save"
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(pickled) as file:
            _skip_pickle(file)
    return OBJECTS
