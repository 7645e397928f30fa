"""Load and save quantized checkpoints: native safetensors files and published ``.pth`` files, detected by content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from qdiff.checkpoint.metadata import read_config
from qdiff.checkpoint.native import load_native, load_native_packed, save_native
from qdiff.checkpoint.published import load_published, to_published
from qdiff.checkpoint.published_widths import check_widths
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.io.tensor_files import is_pickle, load_tensors
from qdiff.io.torch_files import write_torch_file
from qdiff.kernels.packed_weight import PACKED
from qdiff.quant_model import QuantModel


def load_checkpoint(
    qnn: QuantModel, path: str | Path, activations: bool = True, probe: Callable[[], tuple[Tensor, ...]] | None = None
) -> None:
    """Fill a quantized network from a file; nothing is changed unless all of it fits.

    Args:
        qnn: built with the widths and options that the file was made with; activations may stay in float.
        path: native safetensors or a published q-diffusion ``.pth``.
        activations: False takes only the weights, even if the file also has activation ranges (``--resume_w``).
        probe: makes inputs of the network, e.g. two noise samples: (x [N, C, H, W], t [N][, context [N, L, D]]). A
            published file does not store its activation widths; these inputs serve to check them after loading
            (`qdiff.checkpoint.published_widths.check_widths`). Not called for a native file, which stores its widths.

    Raises:
        UserError: the file is missing, damaged, or made with other options or for another network; the message names
            the option to change.
    """
    path = Path(path)
    if qnn.is_packed:
        raise UserError(f"{path} cannot be loaded into a packed network; build a new network, or use load_packed")
    activations = activations and not qnn.config.act_dynamic  # dynamic quantizers have no stored ranges
    if is_pickle(path):
        if activations and qnn.config.modulate:
            raise UserError(
                f"{path} holds ranges of activations, not of their changes; add --resume_w to calibrate these, or "
                "--quant_mode dynamic"
            )
        load_published(qnn, load_tensors(path), path, activations)
        if activations and probe is not None:
            check_widths(qnn, probe(), path)
    else:
        load_native(qnn, path, activations)


def load_packed(
    network: nn.Module,
    path: str | Path,
    config: QuantConfig | None = None,
    activations: bool = True,
    cache_bytes: int = 0,
    integer: bool = False,
) -> QuantModel:
    """Wrap a network and fill it from a native file, with its weights packed from the start.

    The float weight of a quantized layer is never in memory. Biases, norms and ranges come from the file.

    Args:
        network: built under ``torch.device("meta")``; tensors on other devices stay there.
        path: native safetensors.
        config: widths and options of the run, which must match the file's (as for `load_checkpoint`); None takes the
            file's.
        activations: False takes only the weights.
        cache_bytes, integer: see `QuantModel.pack_weights`.

    Returns:
        The packed network, on the CPU.

    Raises:
        UserError: as `load_checkpoint` and `QuantModel.pack_weights`, or the file is a published one.
    """
    path = Path(path)
    if is_pickle(path):
        raise UserError(
            f"{path} is a published checkpoint, which holds float weights; load it with load_checkpoint, then call "
            "pack_weights, or save it in the native format first"
        )
    buffers = {n for n, b in network.named_buffers() if b.is_meta}
    if buffers:
        raise ValueError(f"the buffer {min(buffers)} is on the meta device and in no file; set its values first")
    qnn = QuantModel(network, read_config(path) if config is None else config)
    load_native_packed(qnn, path, activations and not qnn.config.act_dynamic)
    qnn.pack_weights(cache_bytes, integer)
    return qnn


def save_checkpoint(
    qnn: QuantModel,
    path: str | Path,
    format: Literal["native", "published"] = "native",
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a calibrated network to a file; the write is atomic.

    Args:
        path: the file; an existing one is replaced.
        format: ``native`` (packed integers) or ``published`` (float weights and α, readable by the paper's code).
        notes: any JSON values, stored in a native file's metadata (method, seed, …).

    Raises:
        UserError: a quantizer was never set, a packed network has no float weights for a published file, or
            `qdiff.checkpoint.published.to_published` fails; nothing is written.
    """
    path = Path(path)
    qnn.assert_initialised()
    if format == "published" and qnn.is_packed:
        raise UserError(f"{PACKED} for {path}; save the native format")
    if format == "native":
        save_native(qnn, path, notes or {})
    else:
        write_torch_file(to_published(qnn), path)
