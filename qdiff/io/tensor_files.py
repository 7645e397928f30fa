"""Read tensors from files that others made: safetensors and ``torch.save`` archives, without running their code."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.io.torch_files import WHOLE_MODULE, is_module, read_torch_file

_ZIP = b"PK\x03\x04"  # torch.save since PyTorch 1.6
_LEGACY_PICKLE = b"\x80"
MAPPED_FROM = 1 << 28  # bytes
WRAPPERS = ("module", "_orig_mod")  # what DataParallel and torch.compile put into names


def read_float_tensors(path: Path) -> dict[str, Tensor]:
    """Read a float checkpoint, safetensors or ``torch.save``, without running code from it.

    Large files are mapped into memory, not read.

    Raises:
        UserError: missing, damaged, or not a dict of tensors.
    """
    return load_tensors(path) if is_pickle(path) else read_safetensors(path)


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a `UserError` that names the first tensor of a file with a value that is NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path} holds NaN or infinite values, the first in {name}; get or make the file anew")


def check_state(state: dict[str, Tensor], expected: dict[str, Tensor], path: str | Path) -> None:
    """Raise a `UserError` that names the first tensor by which a file differs from what a network expects.

    Differences are those of names, shapes and kinds of number, and values that are not finite.
    """
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = sorted(n for n in expected.keys() & state.keys() if expected[n].shape != state[n].shape)
    # Copied into floats, integers and complex numbers would pass without a word.
    kinds = sorted(
        n for n in expected.keys() & state.keys() if expected[n].is_floating_point() != state[n].is_floating_point()
    )
    for names, what in (
        (missing, "missing"),
        (unexpected, "unexpected"),
        (shapes, "of another shape"),
        (kinds, "of another kind of number"),
    ):
        if names:
            raise UserError(
                f"{path} does not hold the weights of this config's network: {len(names)} tensors {what} "
                f"(e.g. {names[0]}); give the config and the weights of one model"
            )
    check_finite(state, path)


def is_pickle(path: Path) -> bool:
    """Whether a file is a ``torch.save`` archive rather than safetensors, judged by its first bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist; check the path") from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror}); check the path") from None
    if not head:
        raise UserError(f"checkpoint {path} is empty; get or make the file anew")
    # A safetensors file begins with its header's length (8 bytes, the first of which may be 0x80 too), then a "{".
    # A tar archive is none of them, but may have been made by torch.save: `read_torch_file` says what it is.
    return head[:4] == _ZIP or (head[:1] == _LEGACY_PICKLE and head[8:] != b"{") or tarfile.is_tarfile(path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a ``torch.save``d state dict without running code from it; large files are mapped into memory.

    It may lie where training codes put it: under ``state_dict``, or in a list ``[model, optimizer, epoch, step, ema]``,
    of which the averaged weights are taken.

    Objects of a training framework that stand beside the weights (Lightning keeps callbacks and hyperparameters
    there) become inert stand-ins.

    Raises:
        UserError: damaged, truncated, or holding anything but a dict of tensors.
    """
    state = read_torch_file(path, mapped_from=MAPPED_FROM)
    # Lightning files keep the weights one level down.
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    # DDIM's training code writes [model, optimizer, epoch, step] and, where weights are averaged, their averages last.
    if isinstance(state, list | tuple) and state:
        state = state[-1] if isinstance(state[-1], dict) and len(state) > 4 else state[0]
    held = [state, *state.values()] if isinstance(state, dict) else [state]
    if any(map(is_module, held)):
        raise UserError(f"checkpoint {path} {WHOLE_MODULE}")
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"checkpoint {path} is not a plain dict of tensors; give a model's or a quantized checkpoint")
    return state


def unwrapped(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Return a state with the names that a network has, where the saved one was wrapped, in whole or in part.

    ``module.`` (DataParallel) and ``_orig_mod.`` (``torch.compile``) are taken out wherever they stand in a name,
    unless the network itself has a part of that name, or two tensors would get one name.

    Args:
        expected: the network's names.
    """
    own = {part for name in expected for part in name.split(".")}
    wrappers = {w for w in WRAPPERS if w not in own}

    def plain(name: str) -> str:
        return ".".join(part for part in name.split(".") if part not in wrappers)

    names = Counter(plain(name) for name in state)
    return {plain(name) if names[plain(name)] == 1 else name: tensor for name, tensor in state.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file.

    Raises:
        UserError: not a safetensors file, or truncated.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} is damaged or truncated ({error}); get or make the file anew") from error
