"""The native checkpoint: a safetensors file that stores quantized weights at their bit width.

Tensors, each the concatenation over all layers in name order:

    ``weight``            uint8: the packed integers of every layer (`qdiff.kernels.packing`), or float32 if not
                          quantized;
    ``weight_zero_point`` uint8: packed likewise, at the widths of the weights;
    ``float``             uint8: every other parameter, the weights of layers that stay in float among others that do
                          not, and every weight step size in float32: first the lowest byte of
                          all values, then the next bytes, deflated (zlib). This shrinks exponents and signs to a
                          quarter; in networks of two million weights these floats are a tenth of the file;
    ``act_delta``         float32, ``act_zero_point`` int32;
    ``act_shift``         uint8: k of channels' step sizes δ/2^k, two bits each; only with ``power_of_two_scales``;
    ``act_timesteps``     float32: the calibrated timesteps, ascending, if there are ranges per timestep. Each quantizer
                          then has as many δ and zero points, in this order;
    ``input_scale``       uint8: the factors of all layers' input channels (1 where a layer has none), stored as
                          ``float``; only in files of the format ``qdiff-3``, which older readers refuse;
    ``first_token``       uint8, if the config is ``bos_aware``: outputs of the first token, stored as ``float``, and
                          ``first_token_parts``, which layers these are of: 1 has the output, 2 then the token as well.

One tensor per layer would be neater, but each name costs about 100 bytes of header, more than many layers hold.
Metadata: ``format``, ``config`` (JSON of `QuantConfig`), ``layout`` (hash of names and shapes), ``notes`` (JSON),
``checksum`` (JSON: the CRC-32 of every tensor and of the other metadata; older files have none).

Files of the first format can be read too: they have ``<layer>.weight`` per layer, one byte per zero point, and
``float`` as float32.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.checkpoint import optional_tensors as optional
from qdiff.checkpoint.channel_shifts import shifts_of_each, stored_shifts
from qdiff.checkpoint.concatenation import concatenated, separated, split
from qdiff.checkpoint.metadata import (
    CHECKSUM,
    FIRST_FORMAT,
    FORMAT,
    SCALED_FORMAT,
    check_checksum,
    check_metadata,
    checksum,
    read_metadata,
)
from qdiff.errors import UserError
from qdiff.functional import max_level
from qdiff.io.files import written_whole
from qdiff.io.tensor_files import check_finite, read_safetensors
from qdiff.kernels.packing import deflate_floats, inflate_floats, pack, packed_bytes, unpack
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer, Quantizer, WeightQuantizer
from qdiff.ranges.calibrated_timesteps import checked_timesteps
from qdiff.ranges.first_token import FirstToken

FLOAT_BYTES = 4


def _layers(qnn: QuantModel) -> dict[str, QuantModule]:
    return dict(sorted(qnn.layers().items()))


def _weight_quantizers(qnn: QuantModel) -> dict[str, WeightQuantizer]:
    return dict(sorted((n, m) for n, m in qnn.model.named_modules() if isinstance(m, WeightQuantizer)))


def _stored_layers(qnn: QuantModel) -> dict[str, QuantModule]:
    """Layers whose weight is in the tensor ``weight``: those with a width, or all if none has one."""
    return {n: m for n, m in _layers(qnn).items() if qnn.config.weight_bits is None or len(m.weight_quantizers)}


def _plain(qnn: QuantModel) -> dict[str, Tensor]:
    """Parameters that are neither stored as layer weights nor step sizes: biases, normalisation, layers in float."""
    weights = {f"{n}.weight" for n in _stored_layers(qnn)}
    return {n: p for n, p in qnn.model.named_parameters() if n not in weights and not n.endswith(".delta")}


def _float_tensors(qnn: QuantModel) -> dict[str, Tensor]:
    deltas = {f"{n}.delta": q.delta for n, q in _weight_quantizers(qnn).items()}
    tensors = {**_plain(qnn), **deltas}
    return {n: tensors[n] for n in sorted(tensors)}


def layout(qnn: QuantModel) -> str:
    """Return a hash of the names and shapes of a network's tensors, which identifies the network."""
    shapes = {n: tuple(t.shape) for n, t in _float_tensors(qnn).items()}
    shapes |= {f"{n}.weight": tuple(m.weight.shape) for n, m in qnn.layers().items()}
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()[:16]


def content_hash(qnn: QuantModel) -> str:
    """Return a hash of every value of a calibrated network, which tells it from others of the same `layout`."""
    found = hashlib.sha256()
    for layer in _layers(qnn).values():
        values = layer.packed_integers() if len(layer.weight_quantizers) > 0 else layer.weight.detach().float()
        found.update(values.cpu().contiguous().numpy())
    act = [q for _, q in sorted(qnn.calibrated_act_quantizers().items())]
    quantizers = [*_weight_quantizers(qnn).values(), *act]
    found.update(concatenated(list(_plain(qnn).values()), torch.float32).numpy())
    found.update(concatenated([q.delta for q in quantizers], torch.float32).numpy())
    found.update(concatenated([q.zero_point for q in quantizers], torch.int32).numpy())
    if qnn.act_timesteps is not None:
        found.update(qnn.act_timesteps.values.cpu().numpy())
    found.update(concatenated(optional.stored_scales(_layers(qnn)), torch.float32).numpy())
    found.update(concatenated(optional.first_token_values(_layers(qnn)), torch.float32).numpy())
    found.update(concatenated(stored_shifts(act), torch.uint8).numpy())
    return found.hexdigest()[:16]


def save_native(qnn: QuantModel, path: Path, notes: dict[str, Any]) -> None:
    """Write the file atomically."""
    from safetensors.torch import save_file

    layers = _stored_layers(qnn).values()
    if qnn.config.weight_bits is None:
        tensors = {"weight": concatenated([layer.weight for layer in layers], torch.float32)}
    else:
        zero_points = [pack(q.zero_point.to(torch.uint8), q.bits) for q in _weight_quantizers(qnn).values()]
        tensors = {
            "weight": concatenated([layer.packed_integers() for layer in layers], torch.uint8),
            "weight_zero_point": concatenated(zero_points, torch.uint8),
        }
    tensors["float"] = deflate_floats(concatenated(list(_float_tensors(qnn).values()), torch.float32))
    act = [q for _, q in sorted(qnn.calibrated_act_quantizers().items())]
    if act:
        tensors["act_delta"] = concatenated([q.delta for q in act], torch.float32)
        tensors["act_zero_point"] = concatenated([q.zero_point for q in act], torch.int32)
        for shifts in stored_shifts(act):
            tensors["act_shift"] = shifts
    if qnn.act_timesteps is not None:
        tensors["act_timesteps"] = qnn.act_timesteps.values.cpu()
    if scales := optional.stored_scales(_layers(qnn)):
        tensors["input_scale"] = deflate_floats(concatenated(scales, torch.float32))
    tensors |= optional.stored_tokens(_layers(qnn))
    metadata = {
        "format": SCALED_FORMAT if scales else FORMAT,
        "config": json.dumps(qnn.config.to_dict(), separators=(",", ":")),
        "layout": layout(qnn),
        "notes": json.dumps(notes, separators=(",", ":")),
    }
    metadata[CHECKSUM] = checksum(tensors, metadata)
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_native(qnn: QuantModel, path: Path, activations: bool) -> None:
    """Fill the network from a native file; every mismatch is an error before anything is changed.

    The float weight and bias of each layer are left as they are, because the file holds only the quantized ones.

    Args:
        activations: False leaves activation quantizers alone.
    """
    contents = _read(qnn, path, activations)
    contents.take_small_ones(qnn)
    for name, layer in _stored_layers(qnn).items():
        stored = contents.weights[name]
        if qnn.config.weight_bits is None:
            layer.weight.data.copy_(stored.view(layer.weight.shape))
        else:
            integers = unpack(stored, layer.weight_quantizers[0].bits, layer.weight.numel())
            layer.set_weight_int(integers.view(layer.weight.shape))


def load_native_packed(qnn: QuantModel, path: Path, activations: bool) -> None:
    """Fill a network whose parameters may be on the meta device; its weights stay packed as in the file.

    Raises:
        UserError: as `load_native`, or the file's weights are not quantized; nothing is changed.
    """
    if qnn.config.weight_bits is None:
        raise UserError(f"the weights in {path} are not quantized and cannot be packed; load it without packing")
    contents = _read(qnn, path, activations)
    contents.take_small_ones(qnn)
    for name, layer in _stored_layers(qnn).items():
        layer.pack(contents.weights[name])


@dataclass(frozen=True)
class _Contents:
    """The checked contents of a file for one network.

    Attributes:
        weights: by layer, as stored: packed integers, or float32.
        plain: parameters that are neither layer weights nor step sizes.
        ranges: quantizers, each with its δ and z from the file.
        shifts: of the step sizes of channels, by quantizer; empty if the file has none.
        timesteps: [T], of ranges per timestep; None without such ranges.
        scales: of the input channels, by layer; empty if no layer has any.
        tokens: what layers make of the first token, by layer.
    """

    weights: dict[str, Tensor]
    plain: dict[str, Tensor]
    ranges: list[tuple[Quantizer, Tensor, Tensor]]
    shifts: dict[ActQuantizer, Tensor]
    timesteps: Tensor | None
    scales: dict[str, Tensor]
    tokens: dict[str, FirstToken]

    @torch.no_grad()
    def take_small_ones(self, qnn: QuantModel) -> None:
        """Set everything in the network except the layers' weights."""
        for name, value in self.plain.items():
            path, _, leaf = name.rpartition(".")
            module = qnn.model.get_submodule(path)
            if getattr(module, leaf).is_meta:
                setattr(module, leaf, nn.Parameter(value, requires_grad=False))
            elif isinstance(module, QuantModule) and leaf == "bias":
                module.set_quantized_bias(value.to(module.bias))
            else:
                getattr(module, leaf).copy_(value)
        if self.timesteps is not None:
            qnn.act_timesteps.set(self.timesteps)
        for quantizer, delta, zero_point in self.ranges:
            quantizer.set(delta, zero_point, *([self.shifts[quantizer]] if quantizer in self.shifts else []))
        for name, layer in qnn.layers().items():
            layer.set_input_scale(self.scales.get(name))
            token = self.tokens.get(name)
            layer.first_token = None if token is None else token.to(qnn.device)


def _read(qnn: QuantModel, path: Path, activations: bool) -> _Contents:
    metadata = read_metadata(path)
    act = [q for _, q in sorted(qnn.calibrated_act_quantizers().items())] if activations else []
    check_metadata(metadata, path, qnn.config, layout(qnn), bool(act), qnn.own_ends)
    tensors, expected = read_safetensors(path), _float_tensors(qnn)
    check_checksum(tensors, metadata, path)
    try:
        parts = _first_format if metadata["format"] == FIRST_FORMAT else _this_format
        weights, floats, zero_points = parts(qnn, tensors)
        floats = dict(zip(expected, separated(floats, list(expected.values())), strict=True))
        quantizers = _weight_quantizers(qnn)
        like = [q.zero_point for q in quantizers.values()]
        ranges = [
            (quantizer, floats[f"{name}.delta"], zero_point)
            for (name, quantizer), zero_point in zip(quantizers.items(), separated(zero_points, like), strict=True)
        ]
        timesteps = checked_timesteps(tensors["act_timesteps"]) if act and qnn.act_timesteps is not None else None
        if act:
            like = [q.delta if timesteps is None else timesteps for q in act]
            deltas, zero_points = (separated(tensors[f"act_{part}"], like) for part in ("delta", "zero_point"))
            ranges += zip(act, deltas, zero_points, strict=True)
        shifts = shifts_of_each(act, tensors.get("act_shift"), 1 if timesteps is None else len(timesteps))
        for quantizer, delta, zero_point in ranges:
            levels = zero_point.min() >= 0 and zero_point.max() <= max_level(quantizer.bits)
            if not levels or not (torch.isfinite(delta) & (delta > 0)).all():
                raise ValueError("step sizes or zero points are out of range")
        scaled = metadata["format"] == SCALED_FORMAT
        scales = optional.scales_by_layer(_layers(qnn), tensors["input_scale"]) if scaled else {}
        tokens = optional.tokens_by_layer(_layers(qnn), tensors) if qnn.config.bos_aware else {}
        for (name, layer), size in zip(_stored_layers(qnn).items(), _weight_sizes(qnn), strict=True):
            if weights[name].numel() != size:
                raise ValueError(f"{weights[name].numel()} values where {name} has {tuple(layer.weight.shape)}")
    except (KeyError, ValueError, RuntimeError, zlib.error) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}); download or create it again") from error
    check_finite({**floats, **weights}, path)
    plain = {name: floats[name] for name in _plain(qnn)}
    return _Contents(weights, plain, ranges, shifts, timesteps, scales, tokens)


Parts = tuple[dict[str, Tensor], Tensor, Tensor]
"""Weights by layer as stored, float32 values and weights' zero points."""


def _first_format(qnn: QuantModel, tensors: dict[str, Tensor]) -> Parts:
    weights = {name: tensors[f"{name}.weight"].reshape(-1) for name in _stored_layers(qnn)}
    none = torch.empty(0, dtype=torch.uint8)
    return weights, tensors["float"], none if qnn.config.weight_bits is None else tensors["weight_zero_point"]


def _this_format(qnn: QuantModel, tensors: dict[str, Tensor]) -> Parts:
    weights = dict(zip(_stored_layers(qnn), split(tensors["weight"], _weight_sizes(qnn)), strict=True))
    floats = inflate_floats(tensors["float"], sum(t.numel() for t in _float_tensors(qnn).values()))
    zero_points = [torch.empty(0, dtype=torch.uint8)]
    if quantizers := _weight_quantizers(qnn).values():
        counts = [(q.bits, q.zero_point.numel()) for q in quantizers]
        streams = split(tensors["weight_zero_point"], [packed_bytes(count, bits) for bits, count in counts])
        zero_points = [unpack(s, bits, count) for s, (bits, count) in zip(streams, counts, strict=True)]
    return weights, floats, torch.cat(zero_points)


def _weight_sizes(qnn: QuantModel) -> list[int]:
    """Return how many stored values each layer's weight has: bytes if packed, otherwise numbers."""
    return [
        packed_bytes(m.weight.numel(), m.weight_quantizers[0].bits) if len(m.weight_quantizers) else m.weight.numel()
        for m in _stored_layers(qnn).values()
    ]
