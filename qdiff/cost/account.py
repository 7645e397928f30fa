"""The cost of a network: stored bytes, and bit operations of one forward pass. Needs only shapes, no weights.

The size counts the bits of every parameter as a native checkpoint stores it (`qdiff.checkpoint.native`). The BOPs of a
layer are MACs · weight bits · activation bits; attention products are included, and float counts as 32 bits. A
modulated layer (`qdiff.modulation`) has another width at the first call of a trajectory, and keeps two tensors that it
adds to. Where the first token of a context is not quantized (``bos_aware``), its outputs are stored in float32 and cost
no operations.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.checkpoint.channel_shifts import SHIFT_BITS
from qdiff.config import Ablation
from qdiff.cost.count import FLOAT_BITS, Account, LayerCost
from qdiff.interface import AttentionCore
from qdiff.kernels.packing import packed_bytes
from qdiff.machine.meta_device import NormsKeepShapes
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QUANTIZABLE, QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer, DynamicActQuantizer, WeightQuantizer
from qdiff.tracing.context import Context, context_of
from qdiff.tracing.temporal_cache import temporal_layers

FLOAT_BYTES = 4
# Bytes per quantizer value in a native checkpoint: δ is always float32, z of a weight has the weight's width.
ACT_ZERO_POINT_BYTES = 4

_LAYERS = (*QUANTIZABLE, QuantModule)
_ATTENTION = (AttentionCore, QuantAttention)
# Additions of a modulated layer at a later call: a − â and â + Δ per input value, o + W·Δ per output value.
_ADDITIONS_A_INPUT = 2
_KINDS = {2: "Linear", 3: "Conv1d", 4: "Conv2d"}  # by number of weight dimensions


def account(
    network: nn.Module,
    image_shape: tuple[int, ...],
    context_shape: tuple[int, ...] | None = None,
    cached_timesteps: int = 0,
) -> Account:
    """Count the size and the bit operations of a denoising network.

    Widths are those of the quantizers of a `QuantModel`, calibrated or not and whatever its current modes; weights or
    activations without quantizers count as float, as does a float network. The network is not changed and nothing is
    computed: the shapes come from a copy without values on the meta device.

    Args:
        network: takes x [N, C, H, W], t [N] and, if conditional, the context [N, L, D]; on any device.
        image_shape: (C, H, W).
        context_shape: (L, D), or None.
        cached_timesteps: number of timesteps whose outputs of the time embedding and its projections are looked up
            (`qdiff.tracing.temporal_cache`); 0 if they are computed.

    Returns:
        Counts for one sample (N = 1) and one call.
    """
    always_first = isinstance(network, QuantModel) and network.config.ablation is Ablation.CLEARED_STATE
    bos_aware = isinstance(network, QuantModel) and network.config.bos_aware
    network = _unwrapped(network)
    shapes = [image_shape, (), *([] if context_shape is None else [context_shape])]
    work, contexts = _count_work(network, tuple(torch.empty(1, *shape, device="meta") for shape in shapes))
    costs = _costs(network, work)
    if bos_aware:
        costs = _without_first_tokens(network, costs, contexts)
    if always_first:  # the state is cleared before every call, so every call is a first one
        costs = (replace(c, act_bits=c.first_act_bits, additions=0) if c.modulates else c for c in costs)
    if cached_timesteps:
        costs = _looked_up(network, costs, cached_timesteps)
    return Account(tuple(costs), image_shape, context_shape)


def _looked_up(network: nn.Module, costs: Iterable[LayerCost], timesteps: int) -> Iterator[LayerCost]:
    """Yield costs where what depends on t alone is looked up, and not computed.

    A float32 table of the projections' outputs is stored in the place of weights in float. Quantized weights stay: they
    fill the table, which the network does not store.
    """
    names = set(temporal_layers(network))
    in_float = {n: network.get_submodule(n) for n in names if not _weight_quantizers(network.get_submodule(n))}
    for cost in costs:
        cost = replace(cost, macs=0, additions=0) if cost.name in names else cost
        yield replace(cost, size_bytes=0) if cost.name in in_float else cost
    outputs = sum(len(in_float[name].weight) for name in network.temporal_parts().projections if name in in_float)
    yield LayerCost("temporal table", "Table", 0, timesteps * outputs * FLOAT_BYTES)


def _without_first_tokens(
    network: nn.Module, costs: Iterable[LayerCost], contexts: Mapping[str, tuple[Context, int]]
) -> Iterator[LayerCost]:
    """Yield costs where layers do not compute the first token of the context that they read.

    Args:
        contexts: which context a layer reads, and how many tokens that has.
    """
    known = set()  # of each context, one layer has the token
    for cost in costs:
        context, tokens = contexts.get(cost.name, (None, 0))
        if tokens < 2 or min(cost.weight_bits, cost.act_bits) == FLOAT_BITS:
            yield cost
            continue
        floats = len(network.get_submodule(cost.name).weight) + (0 if context in known else context.channels)
        known.add(context)
        scaled = {name: getattr(cost, name) * (tokens - 1) // tokens for name in ("macs", "state_bytes", "additions")}
        yield replace(cost, size_bytes=cost.size_bytes + floats * FLOAT_BYTES, **scaled)


def _weight_quantizers(layer: nn.Module) -> list[WeightQuantizer]:
    return list(layer.weight_quantizers) if isinstance(layer, QuantModule) else []


def _unwrapped(network: nn.Module) -> nn.Module:
    return network.model if isinstance(network, QuantModel) else network


@torch.no_grad()
def _count_work(
    network: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[Context, int]]]:
    """Return counts by name: MACs, input and output elements of a layer; MACs of both products of attention.

    Also, of the layers that read a context, which one, and its number of tokens.
    """
    # The copy takes its tensors from the memo, so none is copied, and float16 networks need no float16 inputs.
    memo: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    for module in network.modules():  # drop user hooks: they must not fire on this shape-only pass
        memo |= {id(hooks): OrderedDict() for hooks in (module._forward_hooks, module._forward_pre_hooks)}
    shadow = copy.deepcopy(network, memo)
    counts: dict[str, tuple[int, ...]] = {}
    contexts: dict[str, tuple[Context, int]] = {}

    def counting(name: str):
        def add(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            if isinstance(module, _ATTENTION):
                now = _attention_macs(*given)
            else:
                now = _layer_macs(module, out), given[0].numel(), out.numel()
                if (context := context_of(given[0], inputs)) is not None:
                    contexts[name] = context, given[0].shape[1]
            counts[name] = tuple(a + b for a, b in zip(counts.get(name, (0,) * len(now)), now, strict=True))

        return add

    for name, module in shadow.named_modules():
        if isinstance(module, QuantModule):
            # The shapes of its products are those of the float layer in every form of its weight.
            module.forward = functools.partial(module.apply_weight, weight=module.weight, bias=module.bias)
        elif isinstance(module, QuantAttention):
            module.acts_quantized = False
        if isinstance(module, (*_LAYERS, *_ATTENTION)):
            module.register_forward_hook(counting(name))
    with NormsKeepShapes():
        shadow.eval()(*inputs)
    return counts, contexts


def _layer_macs(layer: nn.Module, out: Tensor) -> int:
    """MACs of a layer: every output value is a sum over C_in / groups channels times the kernel."""
    return out.numel() * layer.weight[0].numel()


def _attention_macs(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[int, int]:
    """q [N, heads, L, d], k and v [N, heads, S, d]: q·kᵀ has L·S sums of length d, softmax·v has L·d of length S.

    A mask leaves out no products.
    """
    return q.numel() * k.shape[-2], q.numel() // q.shape[-1] * v.shape[-2] * v.shape[-1]


def _costs(module: nn.Module, work: dict[str, tuple[int, ...]], name: str = "") -> Iterator[LayerCost]:
    if isinstance(module, _LAYERS):
        yield from _layer_costs(name, module, *work.get(name, (0, 0, 0)))
        return
    if isinstance(module, _ATTENTION):
        yield from _attention_costs(name, module, work.get(name, (0, 0)))
        return
    if own := sum(p.numel() for p in module.parameters(recurse=False)):
        yield LayerCost(name, type(module).__name__, own, own * FLOAT_BYTES)
    for child, part in module.named_children():
        yield from _costs(part, work, f"{name}.{child}" if name else child)


def _layer_costs(name: str, layer: nn.Module, macs: int, inputs: int, outputs: int) -> Iterator[LayerCost]:
    weight, bias = layer.weight, 0 if layer.bias is None else layer.bias.numel()
    kind, channels = _KINDS[weight.dim()], weight.shape[1]
    slices, weights, acts, first = [channels], [], [], None
    if isinstance(layer, QuantModule):
        slices, weights, acts = layer.slices, list(layer.weight_quantizers), list(layer.act_quantizers)
        if layer.modulates:
            first = _bits(list(layer.first_quantizers), 0)
    widths = [(_bits(weights, i), _bits(acts, i)) for i in range(len(slices))]
    groups = [range(len(slices))] if len(set(widths)) == 1 else [range(i, i + 1) for i in range(len(slices))]
    for i, group in enumerate(groups):
        weight_bits, act_bits = widths[group[0]]
        share = sum(slices[j] for j in group)
        count = weight.numel() * share // channels
        own_bias = bias if i == 0 else 0
        size = packed_bytes(count, weight_bits) if weights else count * FLOAT_BYTES
        size += own_bias * FLOAT_BYTES + _act_range_bytes(acts[j] for j in group if acts)
        if i == 0 and isinstance(layer, QuantModule) and layer.input_scale is not None:
            size += layer.input_scale.numel() * FLOAT_BYTES
        for quantizer in (weights[j] for j in group if weights):
            size += quantizer.delta.numel() * FLOAT_BYTES + _weight_zero_point_bytes(quantizer)
        label = name if len(groups) == 1 else f"{name}[{i}]"
        cost = LayerCost(label, kind, count + own_bias, size, macs * share // channels, weight_bits, act_bits)
        if first is not None:
            own_inputs, own_outputs = inputs * share // channels, outputs if i == 0 else 0
            state = (own_inputs + own_outputs) * FLOAT_BYTES
            additions = _ADDITIONS_A_INPUT * own_inputs + own_outputs
            cost = replace(cost, first_act_bits=first, state_bytes=state, additions=additions)
        yield cost


def _attention_costs(name: str, attention: nn.Module, macs: tuple[int, ...]) -> Iterator[LayerCost]:
    for product, (first, second), count in zip(("qk", "wv"), ("kq", "wv"), macs, strict=True):
        found = [getattr(attention, f"act_quantizer_{operand}", None) for operand in (first, second)]
        bits = [FLOAT_BITS if quantizer is None else quantizer.bits for quantizer in found]
        size = _act_range_bytes(q for q in found if q is not None)
        yield LayerCost(f"{name}.{product}", "Attention", 0, size, count, *bits)


def _bits(quantizers: list[nn.Module], index: int) -> int:
    return quantizers[index].bits if quantizers else FLOAT_BITS


def _weight_zero_point_bytes(quantizer: WeightQuantizer) -> int:
    return packed_bytes(quantizer.zero_point.numel(), quantizer.bits)


def _act_range_bytes(quantizers: Iterator[ActQuantizer]) -> int:
    """Bytes of stored ranges; dynamic ranges are not stored."""
    stored = [q for q in quantizers if not isinstance(q, DynamicActQuantizer)]
    shifts = sum(packed_bytes(q.channel_shifts.numel(), SHIFT_BITS) for q in stored if q.channel_shifts is not None)
    return shifts + sum(q.delta.numel() * FLOAT_BYTES + q.zero_point.numel() * ACT_ZERO_POINT_BYTES for q in stored)
