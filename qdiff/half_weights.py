"""Weights in the precision that autocast computes with, cast once instead of at every call."""

from __future__ import annotations

import torch
from torch import nn

from qdiff.quant_layer import QUANTIZABLE, QuantModule
from qdiff.weight_forms import WeightForm


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
