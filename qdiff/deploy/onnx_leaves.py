"""Replacements for quantized leaves that are traced into ONNX with explicit quantize and dequantize nodes.

The nodes come in pairs right before the operands of low-bit kernels, and nowhere else: the operands of convolutions,
linear layers and attention's products.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from qdiff.deploy.onnx_ranges import BYTE, Quantized, onnx_node, onnx_range
from qdiff.functional import dequantize
from qdiff.kernels.integer_matmul import Geometry, Levels
from qdiff.modulation import LayerMemory
from qdiff.quant_attention import QuantAttention, attention_weights, prescaled
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import DynamicActQuantizer
from qdiff.ranges.first_token import is_same_token


class _WeightSlice(nn.Module):
    """The integers of a slice of a weight, with zero points and δ per channel; stored as bytes at any width.

    Shifts of its input channels are folded into the integers where these still fit a byte (up to 4 bits always);
    otherwise the dequantized weight is divided by 2^k, and the product is computed on float values.
    """

    def __init__(self, levels: Levels) -> None:
        super().__init__()
        most = 0 if levels.shifts is None else int(levels.shifts.max())
        if most > 0 and levels.bits + most + 1 <= BYTE:
            levels, most = levels.shifted(most), 0
        self.register_buffer("factor", 1.0 / (1 << levels.shifts) if most > 0 else None)
        self.register_buffer("integers", levels.integers.to(torch.uint8))
        self.register_buffer("scale", levels.delta.detach().reshape(-1).clone())
        self.register_buffer("zero_point", levels.zero_point.reshape(-1).to(torch.uint8))
        # Response of each kernel tap to an all-ones input: [O], or [O, kernel…].
        sums = dequantize(levels.integers, levels.delta.detach().double(), levels.zero_point).sum(dim=1)
        self.register_buffer("tap_sums", sums.float())

    def forward(self) -> Tensor:
        weight = onnx_node("DequantizeLinear", (self.integers, self.scale, self.zero_point), torch.float32, axis=0)
        return weight if self.factor is None else weight * self.factor


class OnnxLayer(nn.Module):
    """Replaces a `QuantModule`; every slice of the input channels has its own product.

    Attributes:
        memory: state of a layer that modulates, filled before tracing and read after it; else None.
        seen: its ``same`` says which inputs of the last call began with the layer's first token, bool [N]; None for a
            layer without one.
    """

    def __init__(self, layer: QuantModule, name: str) -> None:
        super().__init__()
        self.memory = LayerMemory(name) if layer.modulates else None
        self.operation, self.sizes, self.channel_dim = layer.apply_weight, layer.slices, layer.channel_dim
        self.bias, self.geometry = layer.bias, layer.geometry
        if any(isinstance(q, DynamicActQuantizer) for q in (*layer.act_quantizers, *layer.first_quantizers)):
            layer.assert_multiplies_integers(name)
        quantizes_weight = len(layer.weight_quantizers) > 0
        scale = layer.input_scale if quantizes_weight or len(layer.act_quantizers) else None
        shifts = _shifts_of(layer)
        if shifts is not None:  # the input is multiplied by 2^k before it is quantized, and the weight divided by it
            scale = (1 << shifts) * (1.0 if scale is None else scale)
        if scale is not None:  # in the shape that multiplies an input
            scale = scale.float().view(-1, *[1] * (0 if self.geometry is None else len(self.geometry.stride)))
        self.register_buffer("input_scale", scale)
        self.first_token, self.seen = layer.first_token, SimpleNamespace(same=None)
        self.ranges, self.first_ranges = (
            nn.ModuleList(onnx_range(q, in_bytes=quantizes_weight) for q in quantizers)
            for quantizers in (layer.act_quantizers, layer.first_quantizers)
        )
        self.slices = nn.ModuleList()
        if quantizes_weight:
            integers = layer.integers()
            by_channel = [None] * len(layer.slices)
            if shifts is not None:
                by_channel = shifts.view(1, -1, *[1] * (integers.dim() - 2)).split(layer.slices, dim=1)
            parts = zip(integers.split(layer.slices, dim=1), layer.weight_quantizers, by_channel, strict=True)
            for part, q, own in parts:
                self.slices.append(_WeightSlice(Levels(part, q.delta, q.zero_point, q.bits, own)))
        elif shifts is not None:
            self.weight = layer.weight_over(scale.flatten())
        else:
            self.weight = layer.float_weight() if scale is None else layer.weight_to_quantize()

    def forward(self, x: Tensor) -> Tensor:
        if self.first_token is None:
            return self._output(x)
        if self.first_token.input is not None:
            self.seen.same = is_same_token(x[:, 0], self.first_token.input)
        first = self.first_token.output.view(1, 1, -1).expand(x.shape[0], -1, -1)
        return torch.cat([first, self._output(x[:, 1:])], dim=1)

    def _output(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale
        if self.memory is None:
            return self._product(self._quantized(x, self.ranges), self.bias)
        if self.memory.is_empty:  # the first step has no change to quantize
            first = self._quantized(x, self.first_ranges)
            return self.memory.begin(self._values(first), self._product(first, self.bias))
        changes = self._quantized(self.memory.difference(x), self.ranges)
        return self.memory.advance(x, self._values(changes), self._product(changes, None))

    def _quantized(self, x: Tensor, ranges: nn.ModuleList) -> list[Quantized]:
        parts = [x] if len(self.sizes) == 1 else list(x.split(self.sizes, dim=self.channel_dim))
        if len(ranges) == 0:
            return [Quantized(part) for part in parts]
        return [quantize(part) for quantize, part in zip(ranges, parts, strict=True)]

    def _values(self, parts: list[Quantized]) -> Tensor:
        values = [part.values() for part in parts]
        return values[0] if len(values) == 1 else torch.cat(values, dim=self.channel_dim)

    def _product(self, parts: list[Quantized], bias: Tensor | None) -> Tensor:
        if len(self.slices) == 0:
            return self.operation(self._values(parts), self.weight, bias)
        # If the product is scaled afterwards, its bias must be added after scaling.
        late = bias if parts[0].scale is not None else None
        early, total = None if late is not None else bias, None
        for part, weight in zip(parts, self.slices, strict=True):
            product = self.operation(part.operand, weight(), early)
            if part.shift is not None:
                product = product + part.shift * self._of_ones(weight, part.operand.shape)
            if part.scale is not None:
                product = product * part.scale
            total, early = product if total is None else total + product, None  # the bias is added once
        if late is None:
            return total
        return total + (late if self.geometry is None else late.view(-1, *[1] * len(self.geometry.stride)))

    def _of_ones(self, weight: _WeightSlice, shape: torch.Size) -> Tensor:
        """Return the response to an all-ones input, [O] or [O, …]: at the borders, fewer taps lie inside the input."""
        sums = weight.tap_sums
        if self.geometry is not None:
            for dim, size in enumerate(shape[2:]):
                sums = sums.movedim(1, -1) @ _inside(size, weight.integers.shape[2 + dim], self.geometry, dim)
        return sums


def _shifts_of(layer: QuantModule) -> Tensor | None:
    """Return the shifts of a layer's input channels, uint8 [C_in]; None if all are 0."""
    found = [q.channel_shifts[0] for q in layer.act_quantizers if q.channel_shifts is not None]
    shifts = torch.cat(found) if found else None
    return shifts if shifts is not None and shifts.any() else None


def _inside(size: int, kernel: int, geometry: Geometry, dim: int) -> Tensor:
    """Return for every output position which kernel taps lie inside the input, [kernel, output positions], 0 or 1."""
    stride, padding, dilation = geometry.stride[dim], geometry.padding[dim], geometry.dilation[dim]
    first = range(-padding, size + padding - dilation * (kernel - 1), stride)
    return torch.tensor([[float(0 <= at + tap * dilation < size) for at in first] for tap in range(kernel)])


class OnnxAttention(nn.Module):
    """Replaces a `QuantAttention`.

    Attributes:
        causal, scale: see `AttentionCore`; calls that are routed here set them (`qdiff.tracing.attention_calls`).
    """

    def __init__(self, attention: QuantAttention) -> None:
        super().__init__()
        self.prescale, self.causal, self.scale = attention.prescale, attention.causal, attention.scale
        self.quantizes = hasattr(attention, "act_quantizer_q")
        if self.quantizes:
            for operand in "qkvw":
                # Both operands have dynamic scales; correcting an integer product for both does not pay.
                quantizer = getattr(attention, f"act_quantizer_{operand}")
                setattr(self, operand, onnx_range(quantizer, in_bytes=False))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, scale = prescaled(q, k, self.prescale, self.scale)
        if self.quantizes:
            q, k, v = self.q(q).values(), self.k(k).values(), self.v(v).values()
        weights = attention_weights(q @ k.transpose(-2, -1) * scale, mask, self.causal)
        return (self.w(weights).values() if self.quantizes else weights) @ v
