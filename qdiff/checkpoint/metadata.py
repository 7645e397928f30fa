"""The metadata of native checkpoints, and the check that a file fits a network."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff.config import ActRanges, QuantConfig
from qdiff.errors import UserError
from qdiff.io.files import sha256
from qdiff.io.tensor_files import is_pickle
from qdiff.ranges.estimators import RangeMethod

FORMAT, FIRST_FORMAT = "qdiff-2", "qdiff-1"
SCALED_FORMAT = "qdiff-3"  # as FORMAT, but layers scale their inputs, which readers of FORMAT would not do
CHECKSUM, TEXTS = "checksum", "metadata"
_TEXTS = ("format", "config", "layout", "notes")
# Config fields that must be equal in a file and in a run, and the option that sets each.
_WEIGHT_OPTIONS = {
    "weight_bits": "--weight_bit",
    "split_shortcut": "--split",
    "weight_symmetric": "--w_sym",
    "keep_ends": "--keep_ends",
    "bos_aware": "--bos_aware",
}
_ACT_OPTIONS = {
    "act_bits": "--act_bit",
    "act_symmetric": "--a_sym",
    "softmax_bits": "--sm_abit",
}

_HELD = {ActRanges.SHARED: "the same for all timesteps", ActRanges.TIMESTEP: "those of one timestep each"}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        UserError: the file is not safetensors, or is truncated.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} is damaged or truncated ({error}); download or create it again") from error


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the CRC-32 of each tensor (with its type and shape) and of the metadata's texts, as JSON.

    The tensors' bytes are read in place; nothing is copied.
    """
    found = {}
    for name, tensor in sorted(tensors.items()):
        described = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found[name] = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), described)
    found[TEXTS] = zlib.crc32(json.dumps([metadata.get(key) for key in _TEXTS]).encode())
    return json.dumps(found, separators=(",", ":"))


def check_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Raise a `UserError` if a file's checksum does not match; older files without a checksum pass."""
    if CHECKSUM not in metadata:
        return
    try:
        written = dict(json.loads(metadata[CHECKSUM]))
    except (ValueError, TypeError):
        written = {}
    found = json.loads(checksum(tensors, metadata))
    if wrong := sorted(name for name in found.keys() | written.keys() if found.get(name) != written.get(name)):
        raise UserError(
            f"checkpoint {path} is damaged: the checksum of {wrong[0]} does not match; download or create it again"
        )


def content_hash(path: Path) -> str:
    """Return a SHA-256 that says whether two quantized checkpoints are the same.

    That of a native file is taken of its checksum, because safetensors writes metadata in any order: two files of one
    calibration may differ in their bytes.

    Raises:
        UserError: the file is missing, or is damaged.
    """
    written = None if is_pickle(path) else read_metadata(path).get(CHECKSUM)
    return sha256(path) if written is None else hashlib.sha256(written.encode()).hexdigest()


def read_notes(path: Path) -> dict[str, Any]:
    """Return the notes of a native file, which say what made it."""
    try:
        return dict(json.loads(read_metadata(path).get("notes", "{}")))
    except ValueError:
        return {}


def read_config(path: Path) -> QuantConfig:
    """Return the config that a native file was made with.

    Raises:
        UserError: the file is not native, or is damaged.
    """
    return _config_of(read_metadata(path), path)


def config_if_native(path: str | Path | None) -> QuantConfig | None:
    """Return `read_config` of a file; None for anything else: no path, no file, a published or a damaged one.

    It is for what options leave open before a file is loaded, where what is wrong with it is said.
    """
    if path is None or not Path(path).is_file():
        return None
    try:
        return read_config(Path(path))
    except UserError:
        return None


def _config_of(metadata: dict[str, str], path: Path) -> QuantConfig:
    if metadata.get("format") not in (FORMAT, FIRST_FORMAT, SCALED_FORMAT):
        found = metadata.get("format", "none")
        raise UserError(f"{path} is no native quantized checkpoint (format {found}, not {FORMAT}); give another file")
    try:
        return QuantConfig.from_dict(json.loads(metadata["config"]))
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint {path} is damaged: its config is unreadable ({error}); get the file again"
        ) from error


def check_metadata(
    metadata: dict[str, str],
    path: Path,
    here: QuantConfig,
    layout: str,
    activations: bool,
    ends: tuple[str, str] | None = None,
) -> None:
    """Raise a `UserError` if a file cannot be loaded into a network.

    Args:
        metadata: the file's metadata.
        here: the config that the network was wrapped with.
        layout: the network's layout (`qdiff.checkpoint.native.layout`).
        activations: whether the activation quantizers are needed too.
        ends: names of the network's first and last layer (`QuantModel.own_ends`).
    """
    there = _config_of(metadata, path)
    if activations and there.act_bits is None:
        raise UserError(
            f"checkpoint {path} holds no activation quantizers; leave out --quant_act or calibrate them with --resume_w"
        )
    if activations and there.act_dynamic:
        raise UserError(
            f"checkpoint {path} holds no ranges of activations, because they were dynamic; add "
            "--quant_mode dynamic, or calibrate them with --resume_w"
        )
    if activations and there.modulate != here.modulate:
        held, other = ("changes of activations", "add") if there.modulate else ("activations themselves", "leave out")
        raise UserError(
            f"checkpoint {path} holds ranges of {held}; {other} --modulate, or calibrate others with --resume_w"
        )
    if activations and there.act_ranges is not here.act_ranges:
        raise UserError(
            f"checkpoint {path} holds ranges of activations that are {_HELD[there.act_ranges]}; give --act_ranges "
            f"{there.act_ranges.value}, or calibrate others with --resume_w"
        )
    # A file without finer step sizes of channels fits where there may be some.
    if activations and there.power_of_two_scales and not here.power_of_two_scales:
        raise UserError(
            f"checkpoint {path} holds finer step sizes for single channels; give --power_of_two_scales, or calibrate "
            "other ranges with --resume_w"
        )
    options = {**_WEIGHT_OPTIONS, **(_ACT_OPTIONS if activations else {})}
    if here.calibrates_changes:  # only attention uses softmax_bits, and it has no calibrated ranges then
        options.pop("softmax_bits", None)
    for field, option in options.items():
        a, b = getattr(there, field), getattr(here, field)
        if a != b:
            change = ("add " if a else "leave out ") + option if isinstance(a, bool) else f"give {option} {a}"
            if field == "act_symmetric" and RangeMethod.SEARCH in (there.act_range, here.act_range):
                change = f"{option} has the opposite meaning in EDA-DM; give the --method that the file was made with"
            raise UserError(f"checkpoint {path} was made with {field} {a} but this run has {b}; {change}")
    _check_layer_bits(path, there, here, activations, ends)
    if metadata.get("layout") != layout:
        raise UserError(
            f"checkpoint {path} belongs to another network (names or shapes of its layers differ); give the --config "
            "that it was calibrated with"
        )


def _check_layer_bits(
    path: Path, there: QuantConfig, here: QuantConfig, activations: bool, ends: tuple[str, str] | None
) -> None:
    """Raise a `UserError` that names a layer whose own width in a file is not that of the run."""
    kinds = {"weight": "weight_bits"} | ({"input": "act_bits"} if activations else {})
    for name in sorted(there.named_layers(ends) | here.named_layers(ends)):
        for kind, field in kinds.items():
            a, b = (getattr(config.of_layer(name, ends), field) for config in (there, here))
            if a == b:
                continue
            raise UserError(
                f"checkpoint {path} was made with {_bits(a)} for the {kind} of {name} but this run has {_bits(b)}; "
                + (
                    f"give --layer_bits {path}, which holds its widths"
                    if there.layer_bits
                    else "leave out --layer_bits"
                )
            )


def _bits(width: int | None) -> str:
    return "float" if width is None else f"{width} bits"
