"""``int8_tensorwise``: a signed byte per weight and a float32 scale per output channel, W = k·s (comfy-kitchen).

Our W = δ·(q − z) is this form with k = q − z and s = δ wherever q − z fits in a byte: always with symmetric ranges, and
up to 7 bits with any. The weights are then exactly those of this network in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.quant_layer import QuantModule

BYTE = torch.iinfo(torch.int8)


def why_not_int8(layer: QuantModule) -> str | None:
    """Return why a layer's weight cannot be stored as ``int8_tensorwise``; None if it can."""
    if layer.geometry is not None:
        return "a convolution"
    if len(layer.slices) > 1:
        return f"split at input channel {layer.slices[0]}, and int8_tensorwise has one scale per output channel"
    integers, zero_point = layer.integers(), layer.weight_quantizers[0].zero_point.view(-1)
    low, high = integers.amin(dim=1) - zero_point, integers.amax(dim=1) - zero_point
    if low.min() < BYTE.min or high.max() > BYTE.max:
        return f"q − z from {low.min()} to {high.max()}, more than int8 holds; symmetric ranges (--w_sym) fit"
    return None


def signed_bytes(layer: QuantModule) -> Tensor:
    """Return q − z of a layer that fits, int8 [C_out, C_in]."""
    # Bytes wrap around modulo 256, so the difference of two unsigned bytes is right where it fits in a signed one.
    zero_point = layer.weight_quantizers[0].zero_point.to(torch.uint8)
    return (layer.integers() - zero_point).view(torch.int8)


def scale_of(layer: QuantModule) -> Tensor:
    """Return δ, float32 [C_out, 1]."""
    return layer.weight_quantizers[0].delta.detach().float().clone()
