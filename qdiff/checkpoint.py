"""Load and save quantized checkpoints: our safetensors format and the published ``.pth``, told apart by content."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.files import written_whole
from qdiff.native_format import load_native, save_native
from qdiff.published_format import load_published, to_published
from qdiff.quant_model import QuantModel

_ZIP = b"PK\x03\x04"  # torch.save since PyTorch 1.6
_LEGACY_PICKLE = b"\x80"


def load_checkpoint(qnn: QuantModel, path: str | Path, activations: bool = True) -> None:
    """Fill a quantized network from a file; nothing is changed unless all of it fits.

    Args:
        qnn: built with the widths and options that the file was made with; activations may be left in float.
        path: native safetensors or a published q-diffusion ``.pth``.
        activations: False takes the weights alone, whatever the file holds for activations (``--resume_w``).

    Raises:
        UserError: the file is missing, damaged, or was made with other options or for another network; the message
            names the option to change.
    """
    path = Path(path)
    if is_pickle(path):
        load_published(qnn, load_tensors(path), path, activations)
    else:
        load_native(qnn, path, activations)


def save_checkpoint(
    qnn: QuantModel,
    path: str | Path,
    format: Literal["native", "published"] = "native",
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a calibrated network, whole or not at all.

    Args:
        path: the file; an existing one is replaced.
        format: ``native`` (packed integers) or ``published`` (float weights and α, readable by the paper's code).
        notes: anything JSON can hold, kept in a native file's metadata (method, seed, …).

    Raises:
        UserError: a quantizer was never set, or see `qdiff.published_format.to_published`; nothing is written.
    """
    path = Path(path)
    qnn.assert_initialised()
    if format == "native":
        save_native(qnn, path, notes or {})
    else:
        with written_whole(path) as temporary:
            torch.save(to_published(qnn), temporary)


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
    return head[:4] == _ZIP or (head[:1] == _LEGACY_PICKLE and head[8:] != b"{")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a ``torch.save``d state dict without running code from it.

    Raises:
        UserError: damaged, truncated, or holding anything but a dict of tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"checkpoint {path} is damaged, truncated or not a plain dict of tensors ({reason}); get the file anew"
        ) from error
    # Lightning files keep the weights one level down.
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"checkpoint {path} is not a dict of tensors; give a model's or a quantized checkpoint")
    return state
