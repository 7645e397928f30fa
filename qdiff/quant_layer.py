"""A convolution or linear layer whose weight and input can be quantized."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.config import QuantConfig, RangeMethod
from qdiff.errors import UserError
from qdiff.functional import dequantize, quantize
from qdiff.kernels.integer_matmul import Geometry, Levels, integer_product
from qdiff.kernels.packed_weight import PACKED, PackedWeight
from qdiff.kernels.packing import pack
from qdiff.modulation import LayerMemory
from qdiff.quantizer import DynamicActQuantizer, WeightQuantizer, act_quantizer
from qdiff.ranges.estimators import estimate

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
DEQUANTIZED_AT_A_TIME = 1 << 17  # weights: their three passes stay in a cache


class QuantModule(nn.Module):
    """Stands in for an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Linear``; parameter names stay the same.

    Args:
        layer: the float layer; its parameters are taken over, not copied. ``layer.split_at`` (see
            `qdiff.interface.split_input`) is where its input channels fall into two parts.
        config: widths and ranges.

    State beside ``weight`` and ``bias``:
        weight_int: uint8, weight's shape: the quantized weight, whatever rounding made it.
        weight_quantizers, act_quantizers: one a slice of the input channels (1, or 2 where split).
        packed: the quantized weight at its width, once `pack` was called; ``weight`` then has a shape and no values,
            and ``weight_int`` is None.
    """

    def __init__(self, layer: nn.Module, config: QuantConfig) -> None:
        super().__init__()
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"padding mode {layer.padding_mode} is not supported: only zeros are exact")
        self.weight, self.bias = layer.weight, layer.bias
        self.geometry = _geometry_of(layer)
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
        self.packed: PackedWeight | None = None

    def weight_slices(self) -> Sequence[Tensor]:
        """Return views of the float weight, one a slice."""
        self._assert_not_packed()
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
        self._assert_not_packed()
        self.weight_int.copy_(integers)
        self.baked = None
        if self.released:
            self.weight.copy_(self.dequantized_weight())

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """Return δ·(q − z), weight's shape and dtype."""
        integers = self.integers()
        weight = torch.empty(integers.shape, dtype=self.weight.dtype, device=integers.device)
        rows = max(1, DEQUANTIZED_AT_A_TIME // weight[0].numel())
        parts = zip(self.weight_quantizers, integers.split(self.slices, 1), weight.split(self.slices, 1), strict=True)
        for quantizer, part, out in parts:
            by_row = (t.split(rows) for t in (out, part, quantizer.delta, quantizer.zero_point))
            for some, *quantized in zip(*by_row, strict=True):
                some.copy_(dequantize(*quantized))
        return weight

    def integers(self) -> Tensor:
        """Return the quantized weight as whole numbers, uint8."""
        return self.weight_int if self.packed is None else self.packed.integers()

    def packed_integers(self) -> Tensor:
        """Return them at their width (`qdiff.kernels.packing`), uint8."""
        if self.packed is not None:
            return self.packed.stream
        return pack(self.weight_int, self.weight_quantizers[0].bits)

    def pack(self, stream: Tensor | None = None) -> None:
        """Give up the float weight and the integers of a byte each; what stays are the integers at their width.

        Args:
            stream: these integers, where they come from a file; otherwise the layer's own.
        """
        if self.packed is not None:
            return
        stream = self.packed_integers() if stream is None else stream
        self.packed = PackedWeight(stream, self.weight_quantizers[0].bits, self.weight.shape)
        self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)
        self.weight_int = self.baked = None
        self.released = False

    def bake(self) -> Tensor | None:
        """Return the dequantized weight, computed once instead of in every forward; None where it stays packed."""
        if self.packed is not None:
            return None
        if self.released:
            return self.weight
        if self.baked is None:
            self.baked = self.dequantized_weight()
        return self.baked

    @torch.no_grad()
    def release_float_weight(self) -> None:
        """Overwrite the float weight with the dequantized one, so that no second copy is held."""
        if len(self.weight_quantizers) > 0 and not self.released and self.packed is None:
            self.weight.copy_(self.dequantized_weight())
            self.baked, self.released = None, True

    def forward(self, x: Tensor) -> Tensor:
        if self.released and not self.weights_quantized:
            raise RuntimeError("the float weights of this network were released; load it anew to run it in float")
        if not self.acts_quantized:
            return self._operation(x, self._current_weight(), self.bias)
        if self.modulates:
            return self._modulated(x)
        if self.multiplies_integers:
            return self._integer_product(self._levels(x, self.act_quantizers), self.bias).to(x.dtype)
        return self._operation(self._quantized(x, self.act_quantizers), self._current_weight(), self.bias)

    def _modulated(self, x: Tensor) -> Tensor:
        """o + W·Q(x − â), with â and o carried from step to step; the first step computes W·x + b."""
        if self.memory is None:
            raise RuntimeError("a modulated layer runs inside `with qnn.trajectory():`, opened once for every batch")
        if not self.memory.is_empty:
            return self.memory.advance(x, *self._product(self.memory.difference(x), self.act_quantizers, None))
        if len(self.first_quantizers) > 0:
            return self.memory.begin(*self._product(x, self.first_quantizers, self.bias))
        return self.memory.begin(x, self._operation(x, self._current_weight(), self.bias))

    def _product(self, x: Tensor, quantizers: nn.ModuleList, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return Q(x) and W·Q(x) + b."""
        if self.multiplies_integers:
            levels = self._levels(x, quantizers)
            values = torch.cat([part.values() for part in levels], dim=self._channel_dim)
            return values, self._integer_product(levels, bias).to(x.dtype)
        values = self._quantized(x, quantizers)
        return values, self._operation(values, self._current_weight(), bias)

    def _current_weight(self) -> Tensor:
        """Return the weight of the mode that the layer is in, in floating point."""
        if not self.weights_quantized:
            self._assert_not_packed()
            return self.weight
        if self.soft_weight is not None:
            return self.soft_weight()
        return self.bake() if self.packed is None else self.packed.cached(self.dequantized_weight)

    def assert_multiplies_integers(self, name: str) -> None:
        """Raise a `UserError` with the layer's name where `qdiff.kernels.integer_matmul` cannot compute it."""
        if self.geometry is not None and (self.geometry.groups != 1 or isinstance(self.geometry.padding, str)):
            raise UserError(
                f"{name} has {self.geometry.groups} groups and padding {self.geometry.padding}; integer products are "
                "of 1 group and padding in numbers: run this network simulated"
            )

    @property
    def multiplies_integers(self) -> bool:
        """Whether quantized inputs meet the weight as whole numbers (`qdiff.kernels.integer_matmul`)."""
        return self.weights_quantized and self.packed is not None and self.packed.multiplies_integers

    def _levels(self, x: Tensor, quantizers: nn.ModuleList) -> list[Levels]:
        """Return the integers of the input, one a slice."""
        return [q.levels(part) for q, part in zip(quantizers, x.split(self.slices, self._channel_dim), strict=True)]

    def _integer_product(self, levels: list[Levels], bias: Tensor | None) -> Tensor:
        """W·Q(x) + b: every slice has its step sizes, so their products are summed in floating point."""
        integers = self.packed.integers().split(self.slices, dim=1)
        out = None
        for x, part, quantizer in zip(levels, integers, self.weight_quantizers, strict=True):
            product = integer_product(
                x, Levels(part, quantizer.delta, quantizer.zero_point, quantizer.bits), self.geometry
            )
            out = product if out is None else out.add_(product)
        if bias is None:
            return out
        return out.add_(bias if self.geometry is None else bias.view(-1, *[1] * len(self.geometry.stride)))

    def _assert_not_packed(self) -> None:
        if self.packed is not None:
            raise UserError(f"{PACKED}; load it anew to calibrate it or to run it in float")

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        if self.packed is not None:
            raise UserError(f"{PACKED} for a state dict; save the native format")
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        if self.packed is not None:
            raise UserError(f"{PACKED} to overwrite; build it anew to load a state dict")
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True) -> QuantModule:
        """Move or convert the layer; what a packed one has left of its float weight, shape and dtype, stays nowhere."""
        if self.packed is None:
            return super()._apply(fn, recurse)
        shape, self.weight = self.weight, None
        try:
            return super()._apply(fn, recurse)
        finally:
            dtype = fn(torch.empty(0, dtype=shape.dtype)).dtype
            self.weight = nn.Parameter(torch.empty_like(shape, dtype=dtype, device="meta"), requires_grad=False)

    def _operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the float layer computes with a weight."""
        if self.geometry is None:
            return F.linear(x, weight, bias)
        convolve = F.conv1d if weight.dim() == 3 else F.conv2d
        where = self.geometry
        return convolve(x, weight, bias, where.stride, where.padding, where.dilation, where.groups)

    @property
    def _channel_dim(self) -> int:
        return -1 if self.geometry is None else 1  # linear layers keep channels last

    def _quantized(self, x: Tensor, quantizers: nn.ModuleList) -> Tensor:
        if len(self.slices) == 1:
            return quantizers[0](x)
        dim = self._channel_dim
        parts = x.split(self.slices, dim=dim)
        return torch.cat([q(part) for q, part in zip(quantizers, parts, strict=True)], dim=dim)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, slices={self.slices}"


def _geometry_of(layer: nn.Module) -> Geometry | None:
    """Return where a convolution applies its kernel; None for a linear layer."""
    if isinstance(layer, nn.Linear):
        return None
    return Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
