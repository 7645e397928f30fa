"""The values of a quantized network in two layouts, from ours to theirs and back: integers, ranges, and all floats.

"Ours" is a network of the papers, "theirs" the diffusers network with the same layers (`qdiff.io.tensor_layout`).
`qdiff.diffusers_backend.structure.replace_layers` builds theirs without values, from the config that `quantization_of`
returns or that a folder has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qdiff.config import FIRST, LAST, ActRanges, QuantConfig
from qdiff.diffusers_backend.config import QDiffConfig
from qdiff.diffusers_backend.refusals import refuse_scales
from qdiff.errors import UserError
from qdiff.functional import MOST_SHIFT, max_level
from qdiff.io.tensor_layout import NetworkLayout
from qdiff.kernels.packing import pack
from qdiff.modes import quantized_layers
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer, DynamicActQuantizer, Quantizer
from qdiff.tracing.attention_calls import core_name

INTEGERS = "integers"
ONLY = "only networks that are quantized as the papers' code does can be converted"


def check_convertible(config: QuantConfig) -> None:
    """Raise a `UserError` if a network quantized so cannot be a component of a pipeline."""
    if config.modulate:
        raise UserError(
            "a pipeline's loop opens no trajectory for modulation; give a checkpoint that was made without --modulate"
        )
    if config.act_ranges is not ActRanges.SHARED:
        raise UserError(
            "checkpoints with ranges per timestep are not converted; quantize the pipeline with "
            f"scripts/quantize_pipeline.py --act_ranges {config.act_ranges.value}, or give another checkpoint"
        )
    if config.bos_aware:
        raise UserError(
            "checkpoints with outputs of the first token are not converted; quantize the pipeline with "
            "scripts/quantize_pipeline.py --bos_aware, or give another checkpoint"
        )
    if named := config.named_layers(None) - {FIRST, LAST}:
        raise UserError(
            f"--layer_bits names {min(named)}, which has another name in the other network; quantize that network with "
            f"--layer_bits (only {FIRST} and {LAST} can be converted)"
        )


def quantization_of(qnn: QuantModel, layout: NetworkLayout, notes: dict[str, Any]) -> QDiffConfig:
    """Return how their network is quantized if ours is quantized as ``qnn``.

    Args:
        layout: of the network in ``qnn``, made before it was wrapped.
        notes: for the model card (JSON values).

    Raises:
        UserError: a network quantized so cannot be a component of a pipeline.
    """
    check_convertible(qnn.config)
    refuse_scales(qnn)
    theirs = {pair.ours: pair.theirs for pair in layout.layers}
    cores = {n: t for n, t in layout.attentions.items() if _is_quantized_attention(qnn.model.get_submodule(n))}
    return QDiffConfig(
        attention=dict.fromkeys(cores.values(), 1),
        prescaled=[_core(other) for name, other in cores.items() if qnn.model.get_submodule(name).prescale],
        split_layers=[other for n, m in qnn.layers().items() if len(m.slices) > 1 for other in theirs.get(n, ())],
        left_in_float={n: why for name, why in qnn.left_in_float.items() for n in theirs.get(name, ())},
        ends=None if qnn.ends is None else [theirs[name][0] for name in qnn.ends],
        notes=notes,
        **qnn.config.to_dict(),
    )


def to_theirs(qnn: QuantModel, layout: NetworkLayout, theirs: nn.Module, origin: str) -> None:
    """Give their network the values of ours, and pack its weights.

    Args:
        qnn: calibrated, or filled from a checkpoint; its weights in any form.
        layout: of the network in ``qnn``, made before it was wrapped.
        theirs: with quantized layers that are not packed, e.g. on the meta device.
        origin: what is converted, for error messages.

    Raises:
        UserError: a quantizer of ours has no range, or the two networks are not quantized alike.
    """
    qnn.assert_initialised()
    _check_alike(qnn.model, layout, theirs, origin)
    partners = _partners(qnn.model, layout, theirs, origin)
    _fill(theirs, layout.to_theirs(_values(qnn.model), _values(theirs), origin))
    for name, others in partners.items():
        for other in others:
            _copy_range(qnn.model.get_submodule(name), theirs.get_submodule(other))


def to_ours(theirs: nn.Module, layout: NetworkLayout, qnn: QuantModel, origin: str) -> None:
    """Give our network the values of theirs, and pack its weights; undo `to_theirs`.

    Args:
        theirs: with packed weights.
        layout: of the network in ``qnn``, made before it was wrapped.
        qnn: not packed, e.g. on the meta device.
        origin: what is converted, for error messages.

    Raises:
        UserError: a range is damaged, the two networks are not quantized alike, or layers that are one layer of ours
            have inputs with different ranges.
    """
    _check_ranges(theirs, origin)
    _check_alike(qnn.model, layout, theirs, origin)
    partners = _partners(qnn.model, layout, theirs, origin)
    for name, others in partners.items():
        found = [theirs.get_submodule(other) for other in others]
        if len({(float(q.delta), int(q.zero_point)) for q in found}) > 1:
            raise UserError(
                f"{origin} has different ranges for {' and '.join(others)}, which are the one {name} of the papers' "
                f"network; {ONLY}"
            )
    _fill(qnn.model, layout.to_ours(_values(theirs), _values(qnn.model), origin))
    for name, others in partners.items():
        _copy_range(theirs.get_submodule(others[0]), qnn.model.get_submodule(name))


def _core(attention: str) -> str:
    """Return the name of the one attention core of their attention module."""
    return f"{attention}.{core_name(0)}"


def _is_quantized_attention(module: nn.Module) -> bool:
    return isinstance(module, QuantAttention) and hasattr(module, "act_quantizer_q")


def _check_alike(ours: nn.Module, layout: NetworkLayout, theirs: nn.Module, origin: str) -> None:
    """Raise a `UserError` that names a layer or an attention that the two networks do not quantize in the same way."""
    pairs = [(pair.ours, name) for pair in layout.layers for name in pair.theirs]
    pairs += [(name, _core(other)) for name, other in layout.attentions.items()]
    found = dict(theirs.named_modules())
    for name, other in pairs:
        here, there = _described(ours.get_submodule(name)), _described(found.get(other))
        if here != there:
            raise UserError(f"{origin} has {other} with {there}, where {name} of the papers has {here}; {ONLY}")


def _described(module: nn.Module | None) -> str:
    """Return how a module is quantized, in words."""
    if isinstance(module, QuantModule):
        weights = [q.bits for q in module.weight_quantizers]
        inputs = [q.bits for q in module.act_quantizers]
        return f"{weights} bits for the weight and {inputs} for the input of {module.slices} channels"
    if module is not None and _is_quantized_attention(module):
        scaled = "before" if module.prescale else "after"
        return f"operands that are scaled {scaled} they are quantized"
    return "no quantization"


def _partners(ours: nn.Module, layout: NetworkLayout, theirs: nn.Module, origin: str) -> dict[str, list[str]]:
    """Return the names of their activation quantizers for every one of ours; each of theirs occurs once."""
    owners = {pair.ours: pair.theirs for pair in layout.layers}
    owners |= {name: (_core(other),) for name, other in layout.attentions.items()}
    made: dict[str, list[str]] = {}
    for name, module in ours.named_modules():
        if isinstance(module, ActQuantizer):
            owner, mark, rest = name.partition(".act_quantizer")
            made[name] = [f"{other}{mark}{rest}" for other in owners.get(owner, ())]
    named = sorted(other for others in made.values() for other in others)
    alone = [name for name, others in made.items() if not others]
    alone += set(named).symmetric_difference(n for n, m in theirs.named_modules() if isinstance(m, ActQuantizer))
    if alone:
        raise UserError(f"{origin} has no partner for the quantizer {min(alone)} in the other network; {ONLY}")
    return made


def _values(network: nn.Module) -> dict[str, Tensor]:
    """Return all values except ranges of activations, by layer and kind.

    A quantized weight is ``<layer>.integers`` (uint8, in its shape) with ``<layer>.delta_0`` and ``.zero_point_0``
    [C_out, 1, …], and ``_1`` for the second part of a split input.
    """
    made: dict[str, Tensor] = {}
    kept_apart = set()  # names of tensors in the state dict that are returned in another form
    for name, module in network.named_modules():
        if isinstance(module, Quantizer):
            kept_apart |= {f"{name}.{kind}" for kind in module.state_dict()}
        if isinstance(module, QuantModule):
            kept_apart.add(f"{name}.float_bias")  # of a corrected bias; the network is used quantized alone
        if isinstance(module, QuantModule) and len(module.weight_quantizers):
            kept_apart |= {f"{name}.weight", f"{name}.weight_int", f"{name}.packed.stream"}
            made[f"{name}.{INTEGERS}"] = module.integers()
            for i, quantizer in enumerate(module.weight_quantizers):
                made[f"{name}.delta_{i}"] = quantizer.delta
                made[f"{name}.zero_point_{i}"] = quantizer.zero_point
    return made | {name: value for name, value in network.state_dict().items() if name not in kept_apart}


@torch.no_grad()
def _fill(network: nn.Module, values: dict[str, Tensor]) -> None:
    """Give a network the values that `_values` returns; its weights are packed afterwards."""
    left = dict(values)
    for name, layer in quantized_layers(network).items():
        for i, quantizer in enumerate(layer.weight_quantizers):
            quantizer.set(left.pop(f"{name}.delta_{i}"), left.pop(f"{name}.zero_point_{i}"))
        if len(layer.weight_quantizers):
            assert layer.packed is None, "its integers would stay as they are"
            layer.pack(pack(left.pop(f"{name}.{INTEGERS}"), layer.weight_quantizers[0].bits))
    for name, value in left.items():
        path, _, kind = name.rpartition(".")
        module = network.get_submodule(path)
        copied = value.detach().clone()
        setattr(module, kind, nn.Parameter(copied, requires_grad=False) if kind in module._parameters else copied)


def _copy_range(source: ActQuantizer, target: ActQuantizer) -> None:
    if not isinstance(source, DynamicActQuantizer):
        target.set(source.delta, source.zero_point, source.channel_shifts)


def _check_ranges(network: nn.Module, origin: str) -> None:
    """Raise a `UserError` that names a quantizer without a range, or with one outside its levels."""
    for name, module in network.named_modules():
        if not isinstance(module, Quantizer) or isinstance(module, DynamicActQuantizer):
            continue
        zero_point = module.zero_point
        levels = zero_point.min() >= 0 and zero_point.max() <= max_level(module.bits)
        if isinstance(module, ActQuantizer) and module.channel_shifts is not None:
            levels = levels and module.channel_shifts.max() <= MOST_SHIFT
        if not (module.initialised and levels and (module.delta > 0).all() and module.delta.isfinite().all()):
            raise UserError(f"{origin} is damaged: the range of {name} is missing or wrong; copy the folder again")
