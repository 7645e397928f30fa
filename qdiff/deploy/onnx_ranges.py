"""Activation quantizers that are traced into ONNX as pairs of quantize and dequantize nodes.

A dynamic range has no constant scale, which integer kernels want. So x/δ is rounded instead, by a pair
whose scale is 1, and whoever multiplies it by a weight scales the product by δ:

    W·Q(x) = δ·(W·u + s·W·1),   u = round(x/δ) − s,   s = 0 up to 7 bits, else 128 − z.

Up to 7 bits q − z lies between −127 and 127, which a byte holds whatever z is; at 8 bits it does not, and s moves it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qdiff.functional import fake_quantize_inference, max_level
from qdiff.quantizer import ActQuantizer, DynamicActQuantizer

OPSET = 21
BYTE = 8  # the widest integers that QuantizeLinear's kernels take
MIDDLE = 2 ** (BYTE - 1)


def onnx_node(op: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, **attributes: int) -> Tensor:
    """One ONNX node whose output has the shape of its first input."""
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=dtype, shape=inputs[0].shape, version=OPSET)


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Quantize to a byte and dequantize."""
    quantized = onnx_node("QuantizeLinear", (x, scale, zero_point), torch.uint8)
    return onnx_node("DequantizeLinear", (quantized, scale, zero_point), torch.float32)


class Quantized(NamedTuple):
    """A quantized activation, scale · (operand + shift).

    Attributes:
        operand: what products take.
        scale, shift: one for all or one a sample; None is 1 and 0.
    """

    operand: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def values(self) -> Tensor:
        """Return what it stands for."""
        shifted = self.operand if self.shift is None else self.operand + self.shift
        return shifted if self.scale is None else shifted * self.scale


class OnnxRange(nn.Module):
    """Quantizes by the range of a calibrated quantizer."""

    def __init__(self, quantizer: ActQuantizer) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.register_buffer("scale", quantizer.delta.detach().reshape(()).clone())
        zero_point = quantizer.zero_point.reshape(())
        self.low = float(-zero_point * self.scale)
        self.high = float((max_level(self.bits) - zero_point) * self.scale)
        # Wider than a byte, no kernel takes it: it stays arithmetic on float values.
        self.register_buffer("zero_point", zero_point.to(torch.uint8 if self.bits <= BYTE else torch.int32))

    def forward(self, x: Tensor) -> Quantized:
        if self.bits > BYTE:
            return Quantized(fake_quantize_inference(x, self.scale, self.zero_point, self.bits))
        if self.bits < BYTE:  # the node saturates at 255
            x = x.clamp(self.low, self.high)
        return Quantized(_rounded(x, self.scale, self.zero_point))


class OnnxDynamicRange(nn.Module):
    """Quantizes by a dynamic range, that of each call's tensor.

    Args:
        in_bytes: False leaves it arithmetic on float values, where a separate scale is of no use.
    """

    def __init__(self, quantizer: DynamicActQuantizer, in_bytes: bool) -> None:
        super().__init__()
        self.quantizer, self.in_bytes = quantizer, in_bytes and quantizer.bits <= BYTE
        self.register_buffer("one", torch.ones(()))
        self.register_buffer("middle", torch.tensor(MIDDLE, dtype=torch.uint8))
        # Tensors, or a number minus a tensor would be an operation that the exporter has to decompose.
        self.register_buffer("middle_level", torch.tensor(float(MIDDLE)))
        self.register_buffer("top_level", torch.tensor(float(max_level(quantizer.bits))))

    def forward(self, x: Tensor) -> Quantized:
        bits = self.quantizer.bits
        delta, zero_point = self.quantizer.range_of(x)
        if not self.in_bytes:
            return Quantized(fake_quantize_inference(x, delta, zero_point, bits))
        zero = zero_point.to(delta.dtype)
        levels = torch.minimum(torch.maximum(x / delta, -zero), self.top_level - zero)
        if bits < BYTE:
            return Quantized(_rounded(levels, self.one, self.middle), delta)
        # Rounded before it is shifted, or the sum would round once more.
        shift = self.middle_level - zero
        return Quantized(_rounded(torch.round(levels) - shift, self.one, self.middle), delta, shift)


def onnx_range(quantizer: ActQuantizer, in_bytes: bool = True) -> OnnxRange | OnnxDynamicRange:
    """Return what stands in for a quantizer; see `OnnxDynamicRange`."""
    if isinstance(quantizer, DynamicActQuantizer):
        return OnnxDynamicRange(quantizer, in_bytes)
    return OnnxRange(quantizer)
