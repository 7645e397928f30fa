"""Read ``torch.save`` files without running their code, and say in one sentence what one is that cannot be read."""

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

BEFORE_1_6 = 0x1950A86A20F9469CFC6C  # the first pickle of such a file
LEADING = 3  # pickles before that of the object: this number, the format's version, and sizes of the writer's types
ANEW = "where you trust it, open it once with torch.load(weights_only=False) and torch.save its tensors alone"
WHOLE_MODULE = (
    "holds a whole nn.Module, which is code as well; load it where its classes are, and torch.save its state_dict()"
)
OBJECTS = f"holds objects that only code could make, and code of a file is not run; {ANEW}"


def read_torch_file(path: Path, what: str = "checkpoint", fix: str = "get the file anew", mapped_from: int = 1 << 28):
    """Return what a ``torch.save`` file holds; objects that are no plain data become inert stand-ins (`_Inert`).

    Both formats are read: archives, and what PyTorch wrote before 1.6.

    Args:
        what, fix: what errors call the file, and what they advise where it is damaged.
        mapped_from: archives of so many bytes are mapped into memory, not read.

    Raises:
        UserError: one sentence that says whether the file is damaged, or intact and of a kind that is not read.
    """
    try:
        return _load_inert(path, mapped_from)
    except Exception as error:  # bytes that are no pickle can stop its reader in any way
        raise UserError(f"{what} {path} {_trouble(path, fix, error)}") from error


class _Inert:
    """Stands for a class that is not loaded.

    Its objects are counters: of the types that PyTorch's reader knows, this one takes all that a pickle may give to an
    object, be it items, attributes or slots.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Counter:
        return Counter()


class _Opaque:
    """Stands for a class whose objects take a state that is no dict, as numpy's do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def is_module(value: Any) -> bool:
    """Whether a stand-in was a whole ``nn.Module``."""
    return isinstance(value, Counter) and {"_parameters", "_modules"} <= set(vars(value))


def _load_inert(path: Path, mapped_from: int) -> Any:
    zipped = zipfile.is_zipfile(path)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path if zipped else _as_archive(_old_pickle(path)))
    mapped = zipped and path.stat().st_size >= mapped_from
    stand_ins = [(_Opaque if name.startswith("numpy.") else _Inert, name) for name in names]
    try:
        return _load(path, mapped, stand_ins)
    except TypeError:  # another class that takes such a state
        return _load(path, mapped, [(_Opaque, name) for name in names])


def _load(path: Path, mapped: bool, stand_ins: list[tuple[type, str]]) -> Any:
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _old_pickle(path: Path) -> bytes:
    """Return the pickle of the object in a file from before PyTorch 1.6; the tensors' values follow it."""
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
    """Go to the end of a pickle by its instructions, none of which is carried out; return its last argument."""
    last = None
    for _, argument, _ in pickletools.genops(file):
        last = last if argument is None else argument
    return last


def _as_archive(pickled: bytes) -> io.BytesIO:
    """Return a pickle as PyTorch's archives hold it, for a function that looks through these alone."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    made.seek(0)
    return made


def _trouble(path: Path, fix: str, error: Exception) -> str:
    """Return what is wrong with a file that could not be loaded, and the remedy."""
    try:
        if tarfile.is_tarfile(path):
            return f"is a tar archive, of files or as torch.save wrote before PyTorch 0.2; unpack it, or {ANEW}"
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
        # What it holds can be gone through to the end: either that is no plain data, or the values behind it are cut.
        return OBJECTS if isinstance(error, pickle.UnpicklingError) else f"is truncated; {fix}"
    except Exception:  # the instructions of a pickle end where they should not
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
