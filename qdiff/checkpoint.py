"""Load and save quantized checkpoints: our safetensors format and the published ``.pth``, told apart by content."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from qdiff.errors import UserError
from qdiff.files import written_whole
from qdiff.native_format import load_native, save_native
from qdiff.published_format import load_published, to_published
from qdiff.quant_model import QuantModel
from qdiff.tensor_files import is_pickle, load_tensors


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
    activations = activations and not qnn.config.act_dynamic  # ranges of a file have no place to go
    if is_pickle(path):
        if activations and qnn.config.modulate:
            raise UserError(
                f"{path} holds ranges of activations, not of their changes; add --resume_w to calibrate those, or "
                "--quant_mode dynamic"
            )
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
