"""Temporary modes of quantized leaves, as context managers that restore what was there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn

from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QuantModule

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
