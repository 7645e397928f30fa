"""Read and write the published q-diffusion checkpoint: a ``torch.save``d dict of float weights and quantizer state.

Keys: ``model.<layer>.{weight,bias}``, ``model.<layer>.weight_quantizer[_0].{delta,zero_point[,alpha]}`` (``_0`` is the
SECOND slice of a split layer; hard rounding is ⌊w/δ⌋ + [α ≥ 0], or to nearest without α), and ``act_quantizer[_0]``
likewise. Widths and signedness are not stored: symmetric activation quantizers are signed (z = 0), and a width can only
be inferred from the step sizes (`qdiff.checkpoint.published_widths` does so for activations).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.checkpoint.published_widths import check_softmax_ranges
from qdiff.config import ActRanges
from qdiff.errors import UserError
from qdiff.functional import dequantize, max_level
from qdiff.io.tensor_files import check_finite, unwrapped
from qdiff.modes import scaled_layers
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import Quantizer, WeightQuantizer
from qdiff.ranges.estimators import ESTIMATORS
from qdiff.weight_forms import WeightForm

_ACT_KEY = re.compile(r"\.act_quantizer(_\w+)?\.")
_SECOND_SLICE = re.compile(r"\.(weight|act)_quantizer_0\.")
# A b-bit step size divides the weight's range into 2^b − 1 parts (min-max), or up to about twice as many if the search
# shrank the range. Outside these bounds the file was made with another width.
_WIDTH_BOUNDS = (0.6, 2.5)
# An α with a larger magnitude is a decided rounding; the published code keeps |α| ≲ 2.4, where h(α) saturates.
_DECIDED_ALPHA = 2.5
# Cosine of the angle between a float and its quantized weight: 0.7 at one bit, about 0 for unrelated weights.
LEAST_COSINE = 0.5


def _published_prefix(qnn: QuantModel, name: str) -> str:
    """Turn a quantizer's name in QuantModel (``model.….weight_quantizers.1``) into its published name."""
    name = re.sub(r"\.(weight|act)_quantizers\.0$", r".\1_quantizer", name)
    name = re.sub(r"\.(weight|act)_quantizers\.1$", r".\1_quantizer_0", name)
    return qnn.family.published_name(name)


def _quantizers(qnn: QuantModel, activations: bool = True) -> dict[str, Quantizer]:
    wanted = Quantizer if activations else WeightQuantizer
    return {_published_prefix(qnn, n): m for n, m in qnn.named_modules() if isinstance(m, wanted)}


def _is_signed(qnn: QuantModel, prefix: str, quantizer: Quantizer) -> bool:
    """Whether the published code stores this activation quantizer as signed with z = 0."""
    if not _ACT_KEY.search(prefix + ".") or not qnn.config.act_symmetric:
        return False
    if not quantizer.unsigned:
        return True
    pattern = qnn.family.symmetric_softmax
    return pattern is not None and re.search(pattern, prefix) is not None


def load_published(qnn: QuantModel, state: dict[str, Tensor], path: Path, activations: bool) -> None:
    """Fill the network from a published checkpoint; every mismatch is an error raised before anything is changed.

    Args:
        state: the file's contents.
        path: the file's name for error messages.
        activations: False leaves activation quantizers alone.

    Raises:
        UserError: the file does not fit; the message names the option to change or the keys that do not belong.
    """
    if qnn.config.weight_bits is None:
        raise UserError(f"checkpoint {path} holds quantized weights; give --weight_bit")
    if activations and qnn.config.act_ranges is not ActRanges.SHARED:
        raise UserError(
            f"{path} holds one range per quantizer and none per timestep; add --resume_w to calibrate these, or leave "
            "out --act_ranges"
        )
    if qnn.config.bos_aware:
        raise UserError(f"checkpoint {path} is a published file, which quantizes all tokens; leave out --bos_aware")
    if qnn.config.layer_bits:
        raise UserError(f"checkpoint {path} is a published file, whose layers have one width; leave out --layer_bits")
    quantizers = _quantizers(qnn, activations)
    plain = {n: p for n, p in qnn.named_parameters() if not n.endswith(".delta")}
    state = unwrapped(state, [*plain, *quantizers])
    _check_keys(state, set(quantizers), set(plain), path)
    for name, parameter in plain.items():
        if state[name].shape != parameter.shape:
            raise UserError(
                f"checkpoint {path} belongs to another network: {name} is {tuple(state[name].shape)}, "
                f"here {tuple(parameter.shape)}; give the file of this network"
            )
    check_finite({name: state[name] for name in plain}, path)
    check_finite({name: tensor for name, tensor in state.items() if name.endswith((".alpha", ".zero_point"))}, path)
    _check_symmetry(qnn, state, quantizers, path)
    values = {p: _quantizer_values(qnn, state, p, q, path) for p, q in quantizers.items()}
    softmax = {p: (*values[p], q.bits) for p, q in quantizers.items() if q.unsigned and _ACT_KEY.search(p + ".")}
    check_softmax_ranges({p: (float(delta), int(zero), bits) for p, (delta, zero, bits) in softmax.items()}, path)
    for name, layer in qnn.model.named_modules():
        if isinstance(layer, QuantModule):
            _check_width(state, f"model.{name}", layer, path)
    integers = {name: _rounded(state, f"model.{name}", layer, path) for name, layer in qnn.layers().items()}

    with torch.no_grad():
        for name, parameter in plain.items():
            parameter.copy_(state[name])
        for prefix, quantizer in quantizers.items():
            quantizer.set(*values[prefix])
        for name, layer in qnn.layers().items():
            layer.float_bias = None  # the file's bias is the only one it has
            layer.set_input_scale(None)
            layer.set_weight_int(integers[name])


def _check_keys(state: dict[str, Tensor], prefixes: set[str], plain: set[str], path: Path) -> None:
    activations = any(_ACT_KEY.search(p + ".") for p in prefixes)
    split_here = any(_SECOND_SLICE.search(p + ".") for p in prefixes)
    split_there = any(_SECOND_SLICE.search(k) for k in state)
    if split_there and not split_here:
        raise UserError(f"checkpoint {path} was made with --split; add --split")
    if split_here and not split_there:
        raise UserError(f"checkpoint {path} was made without --split; leave --split out")
    if activations and not any(_ACT_KEY.search(k) for k in state):
        raise UserError(
            f"checkpoint {path} holds no activation quantizers; leave out --quant_act or calibrate them with --resume_w"
        )
    expected = plain | {f"{p}.{part}" for p in prefixes for part in ("delta", "zero_point")}
    # A file made with activations also serves weight-only runs; α is absent if rounding was to nearest.
    optional = {k for k in state if not activations and _ACT_KEY.search(k)}
    optional |= {f"{p}.alpha" for p in prefixes if ".weight_quantizer" in p}
    missing, unexpected = sorted(expected - set(state)), sorted(set(state) - expected - optional)
    if missing or unexpected:
        raise UserError(
            f"checkpoint {path} belongs to another network: "
            f"{len(missing)} keys missing{_example(missing)}, {len(unexpected)} unexpected{_example(unexpected)}"
        )


def _example(keys: list[str]) -> str:
    return f" (e.g. {keys[0]})" if keys else ""


def _quantizer_values(
    qnn: QuantModel, state: dict[str, Tensor], prefix: str, quantizer: Quantizer, path: Path
) -> tuple[Tensor, Tensor]:
    delta, zero_point = state[f"{prefix}.delta"], state[f"{prefix}.zero_point"]
    if delta.numel() != quantizer.delta.numel() or zero_point.numel() not in (1, delta.numel()):
        raise UserError(f"checkpoint {path} is malformed: {prefix} has {delta.numel()} step sizes; get the file again")
    if not bool((delta > 0).all() & torch.isfinite(delta).all()):
        raise UserError(f"checkpoint {path} is malformed: {prefix}.delta is not positive; get the file again")
    zero_point = zero_point.round() + (2 ** (quantizer.bits - 1) if _is_signed(qnn, prefix, quantizer) else 0)
    if zero_point.min() < 0 or zero_point.max() > max_level(quantizer.bits):
        option = "--act_bit" if _ACT_KEY.search(prefix + ".") else "--weight_bit"
        raise UserError(
            f"checkpoint {path} does not fit {quantizer.bits} bits: {prefix} has zero points up to "
            f"{int(zero_point.max())}; change {option}{' or --a_sym' if option == '--act_bit' else ''}"
        )
    return delta.reshape(quantizer.delta.shape), zero_point.expand(delta.shape).reshape(quantizer.delta.shape)


def _check_symmetry(qnn: QuantModel, state: dict[str, Tensor], quantizers: dict[str, Quantizer], path: Path) -> None:
    """Signed files have z = 0 throughout; unsigned ones have some z > 0, for inputs with negative values."""
    zeros = [
        float(state[f"{p}.zero_point"].abs().max())
        for p, q in quantizers.items()
        if _ACT_KEY.search(p + ".") and not q.unsigned
    ]
    if not zeros:
        return
    if qnn.config.act_symmetric and not ESTIMATORS[qnn.config.act_range].one_sided and max(zeros) > 0:
        raise UserError(f"checkpoint {path} was calibrated without --a_sym; leave --a_sym out")
    if not qnn.config.act_symmetric and max(zeros) == 0:
        raise UserError(f"checkpoint {path} was calibrated with --a_sym; add --a_sym")


def _check_width(state: dict[str, Tensor], name: str, layer: QuantModule, path: Path) -> None:
    weight, bits = state[f"{name}.weight"], layer.weight_quantizers[0].bits
    delta = state[f"{name}.weight_quantizer.delta"].reshape(-1)
    rows = weight[:, : layer.slices[0]].reshape(len(weight), -1)
    ratio = float(((rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)) / delta).median()) / max_level(bits)
    if not _WIDTH_BOUNDS[0] <= ratio <= _WIDTH_BOUNDS[1]:
        likely = round(float(torch.log2(torch.tensor(ratio * max_level(bits) + 1))))
        raise UserError(
            f"checkpoint {path} was made with another width: {name} has about {likely}-bit steps, not {bits}-bit; "
            "change --weight_bit"
        )


def _rounded(state: dict[str, Tensor], name: str, layer: QuantModule, path: Path) -> Tensor:
    integers = []
    parts = state[f"{name}.weight"].split(layer.slices, dim=1)
    for i, (quantizer, part) in enumerate(zip(layer.weight_quantizers, parts, strict=True)):
        prefix = f"{name}.weight_quantizer{'_0' if i else ''}"
        scaled = part / state[f"{prefix}.delta"]
        alpha = state.get(f"{prefix}.alpha")
        if alpha is not None and alpha.shape != part.shape:
            raise UserError(
                f"checkpoint {path} is malformed: {prefix}.alpha is {tuple(alpha.shape)} but its weight is "
                f"{tuple(part.shape)}; get the file again"
            )
        rounded = scaled.round() if alpha is None else scaled.floor() + (alpha >= 0)
        zero_point = state[f"{prefix}.zero_point"]
        integers.append((rounded + zero_point).clamp(0, max_level(quantizer.bits)))
    return torch.cat(integers, dim=1)


def to_published(qnn: QuantModel) -> dict[str, Tensor]:
    """Return the published form of a calibrated network.

    The format rounds every weight up or down. Where GPTQ chose another integer, the weight in the file is half a step
    above it and rounds down. Biases are those of the quantized network.

    A softmax quantizer that the published code makes signed (`Family.symmetric_softmax`) gets the 2^(b−1) − 1 positive
    levels of that code, which cannot express the unsigned one.

    Raises:
        UserError: weights or first tokens are in float, ranges are per timestep, channels have step sizes of their own,
            inputs are scaled, or the float weights were released or are not those that were quantized (a native file
            does not hold them).
    """
    if qnn.config.weight_bits is None:
        raise UserError("the published format needs quantized weights; give --weight_bit, or save the native format")
    if qnn.config.act_ranges is not ActRanges.SHARED:
        raise UserError(
            "the published format holds one range per quantizer and none per timestep; save the native format, or "
            "calibrate without --act_ranges"
        )
    if shifted := [
        n for n, q in qnn.act_quantizers().items() if q.channel_shifts is not None and q.channel_shifts.any()
    ]:
        raise UserError(
            f"the published format has one step size per quantizer ({shifted[0]} has finer ones, from "
            "--power_of_two_scales); save the native format, or calibrate without --power_of_two_scales"
        )
    if qnn.config.layer_bits:
        named = ", ".join(f"{name}={bits}" for name, bits in qnn.config.layer_bits[:3])
        raise UserError(f"the published format has one width for all layers ({named} differ); save the native format")
    if qnn.config.bos_aware:
        raise UserError(
            "the published format has no place for outputs of the first token; save the native format, or calibrate "
            "without --bos_aware"
        )
    if scaled := scaled_layers(qnn.model):
        raise UserError(
            f"the published format has no factors of input channels ({scaled[0]} has some, from --scaling); save the "
            "native format, or calibrate without --scaling"
        )
    if any(layer.form is WeightForm.RELEASED for layer in qnn.layers().values()):
        raise UserError(
            "the published format needs the float weights, which this network has released; save it before "
            "release_float_weights, or save the native format"
        )
    state = {n: p.detach().cpu() for n, p in qnn.named_parameters() if not n.endswith(".delta")}
    for prefix, quantizer in _quantizers(qnn).items():
        delta, zero_point = quantizer.delta.detach().cpu(), quantizer.zero_point.cpu().float()
        if _is_signed(qnn, prefix, quantizer):
            if quantizer.unsigned and not zero_point.any():
                delta = delta * (max_level(quantizer.bits) / max_level(quantizer.bits - 1))
                zero_point = torch.zeros_like(zero_point)
            else:
                zero_point = zero_point - 2 ** (quantizer.bits - 1)
        state[f"{prefix}.delta"], state[f"{prefix}.zero_point"] = delta, zero_point
    for name, layer in qnn.layers().items():
        parts = zip(layer.weight_slices(), layer.weight_int.split(layer.slices, dim=1), strict=True)
        for i, (weight, integers) in enumerate(parts):
            prefix = f"model.{name}.weight_quantizer{'_0' if i else ''}"
            bits = layer.weight_quantizers[i].bits
            delta, zero_point = state[f"{prefix}.delta"], state[f"{prefix}.zero_point"]
            floor = (weight.cpu() / delta).floor() + zero_point
            # For clamped weights, either sign of α gives the same integer.
            up, levels = integers.cpu() - floor >= 1, integers.float().cpu()
            far = (floor + up).clamp(0, max_level(bits)) != levels
            if far.any():
                _check_related(weight.cpu(), dequantize(levels, delta, zero_point), name)
                columns = slice(0, layer.slices[0]) if i == 0 else slice(layer.slices[0], None)
                whole = state[f"model.{name}.weight"] = state[f"model.{name}.weight"].clone()
                whole[:, columns][far] = dequantize(levels + 0.5, delta, zero_point)[far].to(whole.dtype)
                up &= ~far
            state[f"{prefix}.alpha"] = torch.where(up, _DECIDED_ALPHA, -_DECIDED_ALPHA)
    return state


def _check_related(weight: Tensor, quantized: Tensor, name: str) -> None:
    """Raise a `UserError` if a quantized weight cannot come from a float one, even by another rounding."""
    if F.cosine_similarity(weight.flatten(), quantized.flatten(), dim=0) < LEAST_COSINE:
        raise UserError(
            f"the float weights of {name} are not those that were quantized, but the published format needs "
            "them; load the float checkpoint before the quantized one, or save the native format"
        )
