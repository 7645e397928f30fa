"""``awq_w4a16``: weights of up to 4 bits, with a scale and a zero per output channel and group of 64 input channels.

W = (q − c)·s + m, with q in [0, 15]. The scale s and the zero m are floats in the file's compute dtype; c is a constant
of the program that loads the file: 8 in ComfyUI (comfy-kitchen), 0 in nunchaku_lite. Our W = δ·(q − z) is this form
with s = δ and m = δ·(c − z), repeated over the groups; the parts of a split layer have their own, so its boundary must
lie between two groups.

How exact that is: s is δ rounded to the compute dtype, and m is (c − z)·s rounded again. With u = 2⁻²⁴ for float32,
2⁻¹¹ for float16 and 2⁻⁸ for bfloat16, the weight that the file states is off by at most u·(δ·|q − z| + s·|c − z|); the
first term is 0 in float32, because δ is float32, and the second wherever the product needs no rounding, e.g. with
z = c. Level z stays within u·s·|c − z| of zero, which is why m is computed from s and not from δ. The program that
loads the file rounds once more when it computes W in its compute dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.kernels.packing import pack
from qdiff.quant_layer import QuantModule

GROUP = 64  # input channels that share a scale and a zero; both programs know no other size
BITS = 4


def why_not_awq(layer: QuantModule, dtype: torch.dtype, rows: int = 1) -> str | None:
    """Return why a layer's weight cannot be stored as ``awq_w4a16``; None if it can.

    Args:
        dtype: of scales and zeros.
        rows: the number of output channels must be a multiple of it.
    """
    channels_out, channels_in = layer.weight.shape[:2]
    bits = layer.weight_quantizers[0].bits
    if layer.geometry is not None:
        return "a convolution"
    if bits > BITS:
        return f"{bits} bits, and awq_w4a16 has {BITS}"
    if channels_in % GROUP:
        return f"{channels_in} input channels, not a multiple of {GROUP}"
    if layer.slices[0] % GROUP:
        return f"split at input channel {layer.slices[0]}, not a multiple of {GROUP}"
    if channels_out % rows:
        return f"{channels_out} output channels, not a multiple of {rows}"
    if not all(_holds(dtype, quantizer.delta) for quantizer in layer.weight_quantizers):
        return f"step sizes outside the range of {str(dtype).removeprefix('torch.')}"
    return None


def _holds(dtype: torch.dtype, delta: Tensor) -> bool:
    """Whether a dtype holds step sizes δ with all of its bits, and the zeros, of up to 15·δ."""
    limits = torch.finfo(dtype)
    return bool((delta >= limits.smallest_normal).all() and (delta * (2**BITS - 1) <= limits.max).all())


def scales_and_zeros(layer: QuantModule, centre: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return s and m of every group, each [C_in / 64, C_out] in the given dtype.

    Args:
        centre: c in W = (q − c)·s + m.
    """
    scales, zeros = [], []
    for quantizer, channels in zip(layer.weight_quantizers, layer.slices, strict=True):
        scale = quantizer.delta.detach().reshape(1, -1).to(dtype)
        # The product is exact in float32 if the scale is narrower, so it is rounded once.
        zero = ((centre - quantizer.zero_point.reshape(1, -1)) * scale.float()).to(dtype)
        scales.append(scale.expand(channels // GROUP, -1))
        zeros.append(zero.expand(channels // GROUP, -1))
    return torch.cat(scales), torch.cat(zeros)


def nibbles_in_order(q: Tensor) -> Tensor:
    """Pack two input channels per byte, the even one in the low nibble (comfy-kitchen's layout).

    Args:
        q: uint8 [N, K], each below 16; K is even.

    Returns:
        int8 [N, K/2].
    """
    return pack(q, BITS).view(torch.int8).view(q.shape[0], -1)


def nibbles_interleaved(q: Tensor) -> Tensor:
    """Pack as the kernels of TinyChat and nunchaku read weights.

    Channel i of 32 input channels and those 8, 16 and 24 further are the nibbles of a 16-bit word, the first lowest.
    Four rows alternate: each gives the 16 words of 64 input channels in its turn.

    Args:
        q: uint8 [N, K], each below 16; N is a multiple of 4 and K of 64.

    Returns:
        int32 [N/4, K/2].
    """
    rows, columns = q.shape
    shifts = torch.arange(0, 16, BITS, device=q.device).view(4, 1)
    words = (q.view(rows, columns // 32, 4, 8).int() << shifts).sum(dim=2).to(torch.int16)
    by_turns = words.view(rows // 4, 4, columns // GROUP, 16).transpose(1, 2)
    return by_turns.reshape(rows // 4, columns).view(torch.int32)
