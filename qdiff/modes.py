"""Modes of quantized leaves: temporary ones restore what was there; half precision of the weights is for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QUANTIZABLE, QuantModule
from qdiff.weight_forms import WeightForm

LEAVES = (QuantModule, QuantAttention)


def leaves(module: nn.Module) -> list[nn.Module]:
    """Return the quantized leaves inside a module (itself included), in registration order."""
    return [m for m in module.modules() if isinstance(m, LEAVES)]


@contextlib.contextmanager
def leaf_modes(modules: Iterable[nn.Module], weights: bool, activations: bool) -> Iterator[None]:
    """Quantize weights and/or activations of all leaves in ``modules`` inside the block.

    Leaves without quantizers of a kind stay in float on that side. Weights are dequantized once, on entry, and
    given up on exit unless an outer block still uses them.
    """
    targets = [leaf for module in modules for leaf in leaves(module)]
    before = [(leaf.acts_quantized, getattr(leaf, "weights_quantized", False)) for leaf in targets]
    try:
        for leaf in targets:
            if isinstance(leaf, QuantModule):
                leaf.acts_quantized = activations and len(leaf.act_quantizers) > 0
                leaf.weights_quantized = weights and len(leaf.weight_quantizers) > 0
                if leaf.weights_quantized:
                    leaf.hold_dequantized()
            else:
                leaf.acts_quantized = activations and hasattr(leaf, "act_quantizer_q")
        yield
    finally:
        for leaf, (acts, weights_before) in zip(targets, before, strict=True):
            leaf.acts_quantized = acts
            if isinstance(leaf, QuantModule):
                leaf.weights_quantized = weights_before
                if not weights_before:
                    leaf.drop_dequantized()


@torch.no_grad()
def halve_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Store weights and biases of convolutions and linear layers in half precision, for good.

    Autocast casts them at every call (it keeps a cast weight only where the weight has a gradient), so what is computed
    under autocast is the same to the bit, with one kernel and a copy less per tensor. Outside of autocast the network
    no longer runs. A quantized layer must hold its dequantized weight by then, or be packed: step sizes stay as they
    are.

    Args:
        network: float, or a `qdiff.quant_model.QuantModel` after ``release_float_weights`` or ``pack_weights``.
        dtype: float16 or bfloat16, autocast's.
    """
    for module in network.modules():
        if not isinstance(module, (*QUANTIZABLE, QuantModule)):
            continue
        if isinstance(module, QuantModule) and len(module.weight_quantizers) > 0:
            assert module.form in (WeightForm.RELEASED, WeightForm.PACKED), "its float weight is still needed"
        for name in ("weight", "bias"):
            parameter = getattr(module, name)
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
