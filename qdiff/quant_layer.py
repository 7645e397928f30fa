"""A convolution or linear layer whose weight and input can be quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.config import QuantConfig, RangeMethod
from qdiff.functional import dequantize, linear_in_fixed_order, quantize
from qdiff.modulation import LayerMemory
from qdiff.quantizer import DynamicActQuantizer, WeightQuantizer, act_quantizer
from qdiff.range_estimators import estimate

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)


class QuantModule(nn.Module):
    """Stands in for an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Linear``; parameter names stay the same.

    Args:
        layer: the float layer; its parameters are taken over, not copied. ``layer.split_at`` (see
            `qdiff.interface.split_input`) is where its input channels fall into two parts.
        config: widths and ranges.

    State beside ``weight`` and ``bias``:
        weight_int: uint8, weight's shape: the quantized weight, whatever rounding made it.
        weight_quantizers, act_quantizers: one a slice of the input channels (1, or 2 where split).
    """

    def __init__(self, layer: nn.Module, config: QuantConfig) -> None:
        super().__init__()
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"padding mode {layer.padding_mode} is not supported: only zeros are exact")
        self.weight, self.bias = layer.weight, layer.bias
        self._operation = _operation_of(layer)
        boundary = getattr(layer, "split_at", None) if config.split_shortcut else None
        channels = self.weight.shape[1]
        self.slices = [channels] if boundary is None else [boundary, channels - boundary]

        self.weight_quantizers = nn.ModuleList()
        self.act_quantizers = nn.ModuleList()
        if config.weight_bits is not None:
            self.weight_quantizers.extend(
                WeightQuantizer(config.weight_bits, config.weight_symmetric, self.weight) for _ in self.slices
            )
            self.register_buffer("weight_int", torch.zeros_like(self.weight, dtype=torch.uint8))
        if config.act_bits is not None:
            self.act_quantizers.extend(
                act_quantizer(config, config.act_bits, config.act_symmetric, False, self._channel_dim)
                for _ in self.slices
            )
        self.modulates = config.modulate and config.act_bits is not None
        # For the first step of a trajectory, which has no change to quantize; empty leaves it in float.
        self.first_quantizers = nn.ModuleList()
        if self.modulates and config.rest_bits is not None:
            self.first_quantizers.extend(
                DynamicActQuantizer(
                    config.rest_bits, config.act_symmetric, False, config.act_scale_per, self._channel_dim
                )
                for _ in self.slices
            )
        # Inside a trajectory: what the layer remembers of the step before.
        self.memory: LayerMemory | None = None
        # Modes, set by `qdiff.modes.leaf_modes`.
        self.weights_quantized = False
        self.acts_quantized = False
        # While rounding is learned: a function that returns the softly rounded weight.
        self.soft_weight: Callable[[], Tensor] | None = None
        # The dequantized weight, there while weights are quantized so that a step costs what float costs.
        self.register_buffer("baked", None, persistent=False)
        self.released = False  # `weight` holds the dequantized values for good

    def weight_slices(self) -> Sequence[Tensor]:
        """Return views of the float weight, one a slice."""
        return self.weight.detach().split(self.slices, dim=1)

    @torch.no_grad()
    def init_weight_ranges(self, method: RangeMethod) -> None:
        """Choose δ and z per output channel and round every weight to the nearest level."""
        integers = []
        for quantizer, part in zip(self.weight_quantizers, self.weight_slices(), strict=True):
            quantizer.set(*estimate(part, quantizer.bits, method, quantizer.symmetric, per_channel=True))
            integers.append(quantize(part.float(), quantizer.delta, quantizer.zero_point, quantizer.bits))
        self.set_weight_int(torch.cat(integers, dim=1))

    @torch.no_grad()
    def set_weight_int(self, integers: Tensor) -> None:
        """Take over quantized weights (any dtype, whole numbers in range, weight's shape)."""
        self.weight_int.copy_(integers)
        self.baked = None
        if self.released:
            self.weight.copy_(self.dequantized_weight())

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """Return δ·(q − z), weight's shape and dtype."""
        parts = zip(self.weight_quantizers, self.weight_int.split(self.slices, dim=1), strict=True)
        return torch.cat([dequantize(p, q.delta, q.zero_point) for q, p in parts], dim=1).to(self.weight.dtype)

    def bake(self) -> Tensor:
        """Return the dequantized weight, computed once instead of in every forward."""
        if self.released:
            return self.weight
        if self.baked is None:
            self.baked = self.dequantized_weight()
        return self.baked

    @torch.no_grad()
    def release_float_weight(self) -> None:
        """Overwrite the float weight with the dequantized one, so that no second copy is held."""
        if len(self.weight_quantizers) > 0 and not self.released:
            self.weight.copy_(self.dequantized_weight())
            self.baked, self.released = None, True

    def forward(self, x: Tensor) -> Tensor:
        if self.released and not self.weights_quantized:
            raise RuntimeError("the float weights of this network were released; load it anew to run it in float")
        weight = self.weight
        if self.weights_quantized:
            weight = self.soft_weight() if self.soft_weight is not None else self.bake()
        if not self.acts_quantized:
            return self._operation(x, weight, self.bias)
        if self.modulates:
            return self._modulated(x, weight)
        return self._operate(self._quantized(x, self.act_quantizers), weight, self.bias)

    def _modulated(self, x: Tensor, weight: Tensor) -> Tensor:
        """o + W·Q(x − â), with â and o carried from step to step; the first step computes W·x + b."""
        if self.memory is None:
            raise RuntimeError("a modulated layer runs inside `with qnn.trajectory():`, opened once for every batch")
        if self.memory.is_empty:
            x = self._quantized(x, self.first_quantizers) if len(self.first_quantizers) > 0 else x
            return self.memory.begin(x, self._operation(x, weight, self.bias))
        change = self._quantized(self.memory.difference(x), self.act_quantizers)
        return self.memory.advance(x, change, self._operation(change, weight, None))

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() == 2 and x.device.type == "cpu" and not torch.is_grad_enabled():
            return linear_in_fixed_order(x, weight, bias)
        return self._operation(x, weight, bias)

    @property
    def _channel_dim(self) -> int:
        return -1 if self._operation is F.linear else 1  # linear layers keep channels last

    def _quantized(self, x: Tensor, quantizers: nn.ModuleList) -> Tensor:
        if len(self.slices) == 1:
            return quantizers[0](x)
        dim = self._channel_dim
        parts = x.split(self.slices, dim=dim)
        return torch.cat([q(part) for q, part in zip(quantizers, parts, strict=True)], dim=dim)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, slices={self.slices}"


def _operation_of(layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    if isinstance(layer, nn.Linear):
        return F.linear
    convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return lambda x, weight, bias: convolve(x, weight, bias, *geometry)
