"""Read tensors from other people's files, safetensors and ``torch.save`` archives, without running their code."""

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
WRAPPERS = ("module", "_orig_mod")  # name parts added by DataParallel and torch.compile


def read_float_tensors(path: Path) -> dict[str, Tensor]:
    """Read a float checkpoint, safetensors or ``torch.save``, without running code from it.

    Large files are memory-mapped.

    Raises:
        UserError: the file is missing, damaged, or not a dict of tensors.
    """
    return load_tensors(path) if is_pickle(path) else read_safetensors(path)


def check_finite(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a `UserError` that names the first tensor of a file with a value that is NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path} holds NaN or infinite values, the first in {name}; download or create it again")


def check_state(state: dict[str, Tensor], expected: dict[str, Tensor], path: str | Path) -> None:
    """Raise a `UserError` that names the first tensor in which a file differs from what a network expects.

    Differences are in names, shapes and kinds of number, or values that are not finite.
    """
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = sorted(n for n in expected.keys() & state.keys() if expected[n].shape != state[n].shape)
    # Integers and complex numbers would be copied into floats without an error.
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
    """Whether a file is a ``torch.save`` archive rather than safetensors, according to its first bytes."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist; check the path") from None
    except OSError as error:
        raise UserError(f"checkpoint {path} cannot be read ({error.strerror}); check the path") from None
    if not head:
        raise UserError(f"checkpoint {path} is empty; download or create it again")
    # A safetensors file begins with its header's length (8 bytes, the first of which may also be 0x80), then a "{". A
    # tar archive is neither, but an old torch.save may have made it; `read_torch_file` reports what it is.
    return head[:4] == _ZIP or (head[:1] == _LEGACY_PICKLE and head[8:] != b"{") or tarfile.is_tarfile(path)


def check_readable(path: str | Path) -> None:
    """Raise a `UserError`, before any long work, if a checkpoint is missing, empty or cannot be opened."""
    is_pickle(Path(path))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a ``torch.save``d state dict without running code from it; large files are memory-mapped.

    It may be where training code puts it: under ``state_dict``, or in a list ``[model, optimizer, epoch, step, ema]``,
        from which the averaged weights are taken.

    Objects of a training framework next to the weights (Lightning stores callbacks and hyperparameters there) become
    inert stand-ins.

    Raises:
        UserError: the file is damaged, truncated, or holds anything but a dict of tensors.
    """
    state = read_torch_file(path, mapped_from=MAPPED_FROM)
    # Lightning files keep the weights one level down.
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    # DDIM's training code writes [model, optimizer, epoch, step], followed by the averaged weights if it averages.
    if isinstance(state, list | tuple) and state:
        state = state[-1] if isinstance(state[-1], dict) and len(state) > 4 else state[0]
    held = [state, *state.values()] if isinstance(state, dict) else [state]
    if any(map(is_module, held)):
        raise UserError(f"checkpoint {path} {WHOLE_MODULE}")
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"checkpoint {path} is not a plain dict of tensors; give a model's or a quantized checkpoint")
    return state


def unwrapped(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Return a state with the network's own names if the saved network was wrapped, in whole or in part.

    ``module.`` (DataParallel) and ``_orig_mod.`` (``torch.compile``) are removed anywhere in a name, unless the network
    itself has a part of that name or two tensors would get the same name.

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
        UserError: the file is not safetensors, or is truncated.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} is damaged or truncated ({error}); download or create it again") from error
