"""Modes of quantized leaves, which are temporary, and half precision of their weights, which is permanent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from qdiff.errors import UserError
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QUANTIZABLE, QuantModule
from qdiff.ranges.first_token import FirstToken
from qdiff.weight_forms import WeightForm

LEAVES = (QuantModule, QuantAttention)
MODES = ("acts_quantized", "weights_quantized", "in_quantized_network")  # of leaves; attention has the first alone


def leaves(module: nn.Module) -> list[nn.Module]:
    """Return the quantized leaves inside a module (itself included), in registration order."""
    return [m for m in module.modules() if isinstance(m, LEAVES)]


def check_is_float(network: nn.Module) -> None:
    """Raise a `UserError` if a network that is to be wrapped has quantized leaves."""
    if leaves(network):
        raise UserError(f"this {type(network).__name__} is already quantized; wrap a float network")


def quantized_layers(module: nn.Module) -> dict[str, QuantModule]:
    """Return the quantized convolutions and linear layers inside a module by name."""
    return {n: m for n, m in module.named_modules() if isinstance(m, QuantModule)}


def scaled_layers(module: nn.Module) -> list[str]:
    """Return the names of the quantized layers inside a module that scale the channels of their input."""
    return [name for name, layer in quantized_layers(module).items() if layer.input_scale is not None]


def first_tokens(module: nn.Module) -> dict[str, FirstToken]:
    """Return what the quantized layers inside a module give for the first token, by the layer's name."""
    layers = quantized_layers(module).items()
    return {name: layer.first_token for name, layer in layers if layer.first_token is not None}


@contextlib.contextmanager
def watched_tokens(module: nn.Module) -> Iterator[None]:
    """Raise the error of `FirstToken.check_seen` at the end of the block if a call inside was for another token."""
    yield
    for token in first_tokens(module).values():
        token.check_seen()


def set_modes(leaf: nn.Module, weights: bool, activations: bool) -> None:
    """Have a leaf quantize its weight and/or activations from now on, as far as it has quantizers for them."""
    if isinstance(leaf, QuantModule):
        leaf.acts_quantized = activations and len(leaf.act_quantizers) > 0
        leaf.weights_quantized = weights and len(leaf.weight_quantizers) > 0
        leaf.in_quantized_network = weights or activations
    else:
        leaf.acts_quantized = activations and hasattr(leaf, "act_quantizer_q")


@contextlib.contextmanager
def leaf_modes(modules: Iterable[nn.Module], weights: bool, activations: bool) -> Iterator[None]:
    """Quantize weights and/or activations of all leaves in ``modules`` inside the block.

    Weights or activations of a leaf without quantizers for them stay in float. Weights are dequantized once, on entry,
    and the dequantized copies are dropped on exit unless an outer block still uses them.
    """
    targets = [leaf for module in modules for leaf in leaves(module)]
    before = [{mode: getattr(leaf, mode) for mode in MODES if hasattr(leaf, mode)} for leaf in targets]
    try:
        for leaf in targets:
            set_modes(leaf, weights, activations)
            if isinstance(leaf, QuantModule) and leaf.weights_quantized:
                leaf.hold_dequantized()
        yield
    finally:
        for leaf, modes in zip(targets, before, strict=True):
            for mode, was in modes.items():
                setattr(leaf, mode, was)
            if isinstance(leaf, QuantModule) and not leaf.weights_quantized:
                leaf.drop_dequantized()


@torch.no_grad()
def halve_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Store weights and biases of convolutions and linear layers permanently in half precision.

    Autocast would cast them at every call (it caches a cast weight only if the weight has a gradient). Results under
    autocast are therefore the same to the bit, with one kernel and one copy less per tensor. Outside of autocast the
    network no longer runs. The weights of quantized layers must be released or packed; step sizes are not changed.

    Args:
        network: float network, or a `qdiff.quant_model.QuantModel` after ``release_float_weights`` or ``pack_weights``.
        dtype: autocast's dtype, float16 or bfloat16.
    """
    for module in network.modules():
        if not isinstance(module, (*QUANTIZABLE, QuantModule)):
            continue
        if isinstance(module, QuantModule) and len(module.weight_quantizers) > 0:
            assert module.form in (WeightForm.RELEASED, WeightForm.PACKED), "its float weight is still needed"
        for name in ("weight", "bias"):
            parameter = getattr(module, name)
            if isinstance(parameter, nn.Parameter):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
            elif parameter is not None:  # the shape of a packed weight
                setattr(module, name, parameter.to(dtype))
