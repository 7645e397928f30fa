"""Our checkpoint: a safetensors file in which quantized weights take their width.

Tensors:
    ``<layer>.weight``    uint8, the packed integers of a layer (`qdiff.packing`), or float32 where not quantized;
    ``float``             float32: every other parameter and every weight step size, concatenated in name order;
    ``weight_zero_point`` uint8, ``act_delta`` float32, ``act_zero_point`` int32: likewise concatenated.
One tensor a layer would be neater for the small ones, but a name costs about 100 bytes of header, more than most hold.
Metadata: ``format``, ``config`` (JSON of `QuantConfig`), ``layout`` (hash of names and shapes), ``notes`` (JSON).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff.config import QuantConfig, RangeMethod
from qdiff.errors import UserError
from qdiff.files import written_whole
from qdiff.functional import max_level
from qdiff.packing import pack, packed_bytes, unpack
from qdiff.quant_model import QuantModel
from qdiff.quantizer import WeightQuantizer
from qdiff.tensor_files import read_safetensors

FORMAT = "qdiff-1"
# Config fields that a file and the options of a run must agree on, and the option that sets each.
_WEIGHT_OPTIONS = {
    "weight_bits": "--weight_bit",
    "split_shortcut": "--split",
    "weight_symmetric": "--w_sym",
    "keep_ends": "--keep_ends",
}
_ACT_OPTIONS = {
    "act_bits": "--act_bit",
    "act_symmetric": "--a_sym",
    "softmax_bits": "--sm_abit",
}


def _weight_quantizers(qnn: QuantModel) -> dict[str, WeightQuantizer]:
    return {n: m for n, m in qnn.model.named_modules() if isinstance(m, WeightQuantizer)}


def _plain(qnn: QuantModel) -> dict[str, Tensor]:
    """Parameters that are neither layer weights nor step sizes: biases and normalisation."""
    weights = {f"{n}.weight" for n in qnn.layers()}
    return {n: p for n, p in qnn.model.named_parameters() if n not in weights and not n.endswith(".delta")}


def _float_tensors(qnn: QuantModel) -> dict[str, Tensor]:
    deltas = {f"{n}.delta": q.delta for n, q in _weight_quantizers(qnn).items()}
    tensors = {**_plain(qnn), **deltas}
    return {n: tensors[n] for n in sorted(tensors)}


def _layout(qnn: QuantModel) -> str:
    shapes = {n: tuple(t.shape) for n, t in _float_tensors(qnn).items()}
    shapes |= {f"{n}.weight": tuple(m.weight.shape) for n, m in qnn.layers().items()}
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()[:16]


def _concatenated(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t.detach().reshape(-1).cpu().to(dtype) for t in tensors] or [torch.empty(0, dtype=dtype)])


def save_native(qnn: QuantModel, path: Path, notes: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    from safetensors.torch import save_file

    weight_quantizers = _weight_quantizers(qnn)
    bits = qnn.config.weight_bits
    tensors = {
        f"{name}.weight": layer.weight.detach().float().cpu().contiguous()
        if bits is None
        else pack(layer.weight_int, layer.weight_quantizers[0].bits)
        for name, layer in qnn.layers().items()
    }
    tensors["float"] = _concatenated(list(_float_tensors(qnn).values()), torch.float32)
    if bits is not None:
        zero_points = [q.zero_point for _, q in sorted(weight_quantizers.items())]
        tensors["weight_zero_point"] = _concatenated(zero_points, torch.uint8)
    act = [q for _, q in sorted(qnn.calibrated_act_quantizers().items())]
    if act:
        tensors["act_delta"] = _concatenated([q.delta for q in act], torch.float32)
        tensors["act_zero_point"] = _concatenated([q.zero_point for q in act], torch.int32)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(qnn.config.to_dict()),
        "layout": _layout(qnn),
        "notes": json.dumps(notes),
    }
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file.

    Raises:
        UserError: not a safetensors file, or truncated.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path} is damaged or truncated ({error}); get or make the file anew") from error


def load_native(qnn: QuantModel, path: Path, activations: bool) -> None:
    """Fill the network from our format; every mismatch is an error before anything is changed.

    The float weight of each layer is left as it is: the file holds only the quantized one.

    Args:
        activations: False leaves activation quantizers alone.
    """
    metadata = read_metadata(path)
    act = [q for _, q in sorted(qnn.calibrated_act_quantizers().items())] if activations else []
    _check(qnn, metadata, path, bool(act))
    tensors = read_safetensors(path)
    try:
        expected = _float_tensors(qnn)
        floats = dict(zip(expected, _separated(tensors["float"], list(expected.values())), strict=True))
        integers, quantizer_state = {}, []
        for name, layer in qnn.layers().items():
            stored, weight = tensors[f"{name}.weight"], layer.weight
            if qnn.config.weight_bits is not None:
                stored = unpack(stored, layer.weight_quantizers[0].bits, weight.numel())
            integers[name] = stored.reshape(weight.shape)
        weight_quantizers = sorted(_weight_quantizers(qnn).items())
        if weight_quantizers:
            like = [q.zero_point for _, q in weight_quantizers]
            zero_points = _separated(tensors["weight_zero_point"], like)
            for (name, quantizer), zero_point in zip(weight_quantizers, zero_points, strict=True):
                quantizer_state.append((quantizer, floats[f"{name}.delta"], zero_point))
        if act:
            deltas = _separated(tensors["act_delta"], [q.delta for q in act])
            zero_points = _separated(tensors["act_zero_point"], [q.zero_point for q in act])
            quantizer_state += zip(act, deltas, zero_points, strict=True)
        for quantizer, delta, zero_point in quantizer_state:
            if not (torch.isfinite(delta) & (delta > 0)).all() or zero_point.max() > max_level(quantizer.bits):
                raise ValueError("step sizes or zero points out of range")
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}); get or make the file anew") from error

    with torch.no_grad():
        for name, parameter in _plain(qnn).items():
            parameter.copy_(floats[name])
        for quantizer, delta, zero_point in quantizer_state:
            quantizer.set(delta, zero_point)
        for name, layer in qnn.layers().items():
            if qnn.config.weight_bits is None:
                layer.weight.copy_(integers[name])
            else:
                layer.set_weight_int(integers[name])


def _separated(values: Tensor, like: list[Tensor]) -> list[Tensor]:
    if values.numel() != sum(t.numel() for t in like):
        raise ValueError(f"{values.numel()} values where {sum(t.numel() for t in like)} are needed")
    return [v.reshape(t.shape) for v, t in zip(values.split([t.numel() for t in like]), like, strict=True)]


def _check(qnn: QuantModel, metadata: dict[str, str], path: Path, activations: bool) -> None:
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        raise UserError(f"{path} is no quantized checkpoint of ours (format {found}, not {FORMAT}); give another file")
    try:
        there, here = QuantConfig.from_dict(json.loads(metadata["config"])), qnn.config
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint {path} is damaged: its config is unreadable ({error}); get the file anew"
        ) from error
    if activations and there.act_bits is None:
        raise UserError(
            f"checkpoint {path} holds no activation quantizers; leave out --quant_act, or "
            "calibrate them with --resume_w"
        )
    if activations and there.act_dynamic:
        raise UserError(
            f"checkpoint {path} holds no ranges of activations, they were taken from the tensor at hand; add "
            "--quant_mode dynamic, or calibrate them with --resume_w"
        )
    if activations and there.modulate != here.modulate:
        held, other = ("changes of activations", "add") if there.modulate else ("activations themselves", "leave out")
        raise UserError(
            f"checkpoint {path} holds ranges of {held}; {other} --modulate, or calibrate others with --resume_w"
        )
    options = {**_WEIGHT_OPTIONS, **(_ACT_OPTIONS if activations else {})}
    if here.calibrates_changes:  # attention, the only user of it, has no calibrated ranges then
        options.pop("softmax_bits", None)
    for field, option in options.items():
        a, b = getattr(there, field), getattr(here, field)
        if a != b:
            change = ("add " if a else "leave out ") + option if isinstance(a, bool) else f"give {option} {a}"
            if field == "act_symmetric" and RangeMethod.SEARCH in (there.act_range, here.act_range):
                change = f"EDA-DM means the opposite by {option}: give the --method that it was made by"
            raise UserError(f"checkpoint {path} was made with {field} {a}, this run asks for {b}; {change}")
    if metadata.get("layout") != _layout(qnn):
        raise UserError(
            f"checkpoint {path} belongs to another network (names or shapes of its layers differ); give the --config "
            "that it was calibrated with"
        )


def counted_bytes(qnn: QuantModel) -> int:
    """Return the bytes of what `save_native` stores, without the file's header."""
    weights = sum(
        packed_bytes(m.weight.numel(), m.weight_quantizers[0].bits) if m.weight_quantizers else m.weight.numel() * 4
        for m in qnn.layers().values()
    )
    floats = sum(t.numel() * 4 for t in _float_tensors(qnn).values())
    zero_points = sum(q.zero_point.numel() for q in _weight_quantizers(qnn).values())
    return weights + floats + zero_points + 8 * len(qnn.calibrated_act_quantizers())
