"""Stand-ins for quantized leaves that are traced into ONNX with explicit quantize and dequantize nodes.

Nodes come in pairs right before what a low-bit kernel consumes, and nowhere else: the operands of convolutions, of
linear layers and of attention's products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.functional import fake_quantize_inference, max_level
from qdiff.modulation import LayerMemory
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import ActQuantizer

OPSET = 21
BYTE = 8  # the widest integers that QuantizeLinear's kernels take


def _node(op: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, **attributes: int) -> Tensor:
    """One ONNX node whose output has the shape of its first input."""
    return torch.onnx.ops.symbolic(op, inputs, attributes, dtype=dtype, shape=inputs[0].shape, version=OPSET)


class OnnxRange(nn.Module):
    """Quantizes and dequantizes an activation, by the range of a calibrated quantizer."""

    def __init__(self, quantizer: ActQuantizer) -> None:
        super().__init__()
        self.bits = quantizer.bits
        self.register_buffer("scale", quantizer.delta.detach().reshape(()).clone())
        zero_point = quantizer.zero_point.reshape(())
        self.low = float(-zero_point * self.scale)
        self.high = float((max_level(self.bits) - zero_point) * self.scale)
        # Wider than a byte, no kernel takes it: it stays arithmetic on float values.
        self.register_buffer("zero_point", zero_point.to(torch.uint8 if self.bits <= BYTE else torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self.bits > BYTE:
            return fake_quantize_inference(x, self.scale, self.zero_point, self.bits)
        if self.bits < BYTE:  # the node saturates at 255
            x = x.clamp(self.low, self.high)
        quantized = _node("QuantizeLinear", (x, self.scale, self.zero_point), torch.uint8)
        return _node("DequantizeLinear", (quantized, self.scale, self.zero_point), torch.float32)


class _WeightSlice(nn.Module):
    """The integers of a slice of a weight, their zero points and δ a channel; bytes, whatever their width."""

    def __init__(self, integers: Tensor, delta: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("integers", integers.to(torch.uint8))
        self.register_buffer("scale", delta.detach().reshape(-1).clone())
        self.register_buffer("zero_point", zero_point.reshape(-1).to(torch.uint8))

    def forward(self) -> Tensor:
        return _node("DequantizeLinear", (self.integers, self.scale, self.zero_point), torch.float32, axis=0)


class OnnxLayer(nn.Module):
    """Stands in for a `QuantModule`; every slice of the input channels is a product of its own.

    Attributes:
        memory: of a layer that modulates: what whoever traces it fills before and reads after. Else None.
    """

    def __init__(self, layer: QuantModule, name: str) -> None:
        super().__init__()
        self.memory = LayerMemory(name) if layer.modulates else None
        self.operation, self.sizes, self.channel_dim = layer._operation, layer.slices, layer._channel_dim
        self.bias = layer.bias
        self.ranges = nn.ModuleList(OnnxRange(q) for q in layer.act_quantizers)
        self.slices = nn.ModuleList()
        if len(layer.weight_quantizers) > 0:
            parts = layer.integers().split(layer.slices, dim=1)
            for part, q in zip(parts, layer.weight_quantizers, strict=True):
                self.slices.append(_WeightSlice(part, q.delta, q.zero_point))
        else:
            self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.memory is None:
            return self._product(self._quantized(x), self.bias)
        if self.memory.is_empty:  # the first step, in float
            return self.memory.begin(x, self._product(self._parts(x), self.bias))
        changes = self._quantized(self.memory.difference(x))
        return self.memory.advance(x, torch.cat(changes, dim=self.channel_dim), self._product(changes, None))

    def _parts(self, x: Tensor) -> list[Tensor]:
        return [x] if len(self.sizes) == 1 else list(x.split(self.sizes, dim=self.channel_dim))

    def _quantized(self, x: Tensor) -> list[Tensor]:
        parts = self._parts(x)
        return [q(part) for q, part in zip(self.ranges, parts, strict=True)] if len(self.ranges) > 0 else parts

    def _product(self, parts: list[Tensor], bias: Tensor | None) -> Tensor:
        if len(self.slices) == 0:
            return self.operation(torch.cat(parts, dim=self.channel_dim), self.weight, bias)
        total = None
        for part, weight in zip(parts, self.slices, strict=True):
            product = self.operation(part, weight(), bias)
            total, bias = product if total is None else total + product, None  # the bias counts once
        return total


class OnnxAttention(nn.Module):
    """Stands in for a `QuantAttention`."""

    def __init__(self, attention: QuantAttention) -> None:
        super().__init__()
        self.prescale = attention.prescale
        self.quantizes = hasattr(attention, "act_quantizer_q")
        if self.quantizes:
            for operand in "qkvw":
                setattr(self, operand, OnnxRange(getattr(attention, f"act_quantizer_{operand}")))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        if self.prescale:
            q, k, scale = q * scale**0.5, k * scale**0.5, 1.0
        if self.quantizes:
            q, k, v = self.q(q), self.k(k), self.v(v)
        weights = F.softmax(q @ k.transpose(-2, -1) * scale, dim=-1)
        return (self.w(weights) if self.quantizes else weights) @ v
