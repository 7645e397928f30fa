"""A convolution or linear layer whose weight and input can be quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.kernels.integer_matmul import Geometry, Levels, integer_product
from qdiff.modulation import LayerMemory
from qdiff.quantizer import DynamicActQuantizer, act_quantizer, kept_wide
from qdiff.ranges.first_token import FirstToken
from qdiff.weight_forms import WeightedModule, WeightForm

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)


class QuantModule(WeightedModule):
    """Replaces an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Linear``; parameter names stay the same.

    Args:
        layer: the float layer; its parameters are shared, not copied. ``layer.split_at`` (see
            `qdiff.interface.split_input`) is the channel at which its input is split into two parts.
        config: widths and ranges.
        is_shortcut: the layer is the convolution of a shortcut, whose input `QuantConfig.power_of_two_scales` is for.

    State in addition to the weight's (`qdiff.weight_forms`):
        bias: bias of the quantized layer, or None; equals the float layer's unless it was corrected.
        float_bias: bias of the float layer if ``bias`` was corrected, else None.
        input_scale: [C_in] in at least float32 (1/τ in papers): in a quantized forward the input's channels are
            multiplied by it before anything is quantized, and W divided by it is quantized; None for no scale.
        act_quantizers: one per slice of the input channels (1, or 2 if split).
        first_quantizers: likewise, for the first step of a trajectory, which has no change to quantize; empty if that
            step stays in float.
        first_token: if set, inputs are tokens [N, L, C_in] of which the first is always the same: its output is a
            constant, and only the others are quantized; None quantizes all of an input.
    """

    def __init__(self, layer: nn.Module, config: QuantConfig, is_shortcut: bool = False) -> None:
        if getattr(layer, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"padding mode {layer.padding_mode} is not supported; use padding_mode 'zeros'")
        boundary = getattr(layer, "split_at", None) if config.split_shortcut else None
        channels = layer.weight.shape[1]
        slices = [channels] if boundary is None else [boundary, channels - boundary]
        super().__init__(layer.weight, slices, config)
        self.bias = layer.bias
        self.register_buffer("float_bias", None)
        self.register_buffer("input_scale", None)
        self.register_module("first_token", None)
        self.geometry = _geometry_of(layer)

        self.act_quantizers = nn.ModuleList()
        if config.act_bits is not None:
            finer = config.power_of_two_scales and is_shortcut and self.groups == 1
            given = (config, config.act_bits, config.act_symmetric, False, self.channel_dim)
            self.act_quantizers.extend(act_quantizer(*given, size if finer else None) for size in slices)
        self.modulates = config.modulate and config.act_bits is not None
        self.first_quantizers = nn.ModuleList()
        if self.modulates and config.rest_bits is not None:
            self.first_quantizers.extend(
                DynamicActQuantizer(
                    config.rest_bits, config.act_symmetric, False, config.act_scale_per, self.channel_dim
                )
                for _ in slices
            )
        # Inside a trajectory: the layer's state from the previous step.
        self.memory: LayerMemory | None = None
        # Modes, set by `qdiff.modes.leaf_modes`.
        self.weights_quantized = self.acts_quantized = False
        self.in_quantized_network = False  # then ``bias`` is the corrected one, also where the layer stays in float

    def forward(self, x: Tensor) -> Tensor:
        if self.first_token is None or not (self.weights_quantized or self.acts_quantized):
            return self._output(x)
        return self.first_token.before(self._output(self.quantized_part(x)), x)

    def _output(self, x: Tensor) -> Tensor:
        if self.weights_quantized or self.acts_quantized:
            x = self.scaled_input(x)
        if not self.acts_quantized:
            return self.apply_weight(x, self._current_weight(), self._current_bias())
        if self.modulates:
            return self._modulated(x)
        if self.multiplies_integers:
            return self._integer_product(self._levels(x, self.act_quantizers), self.bias).to(x.dtype)
        return self.apply_weight(self._quantized(x, self.act_quantizers), self._current_weight(), self.bias)

    def scaled_input(self, x: Tensor) -> Tensor:
        """Return an input with its channels multiplied by ``input_scale``, in its shape and dtype."""
        return x if self.input_scale is None else self.times_channels(x, self.input_scale)

    def quantized_part(self, x: Tensor) -> Tensor:
        """Return what of an input is quantized: all of it, or all tokens but the first (`first_token`)."""
        return x if self.first_token is None else x[:, 1:]

    def quantized_input(self, x: Tensor) -> Tensor:
        """Return an input as the activation quantizers give it to the product: scaled, in its shape."""
        x = self.scaled_input(x)
        part = self._quantized(self.quantized_part(x), self.act_quantizers)
        return part if self.first_token is None else torch.cat([x[:, :1], part], dim=1)

    def weight_to_quantize(self) -> Tensor:
        return self.float_weight() if self.input_scale is None else self.weight_over(self.input_scale)

    def times_channels(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return an input times a factor for each of its channels [C_in], in its shape and dtype."""
        trailing = 0 if self.geometry is None else len(self.geometry.stride)
        return (x * scale.view(-1, *[1] * trailing)).to(x.dtype)

    def weight_over(self, scale: Tensor) -> Tensor:
        """Return the float weight divided by a factor for each input channel [C_in], in its shape and dtype."""
        weight = self.float_weight()
        by_group = scale.view(self.groups, 1, -1, *[1] * (weight.dim() - 2))
        return (weight.unflatten(0, (self.groups, -1)) / by_group).to(weight.dtype).flatten(0, 1)

    @torch.no_grad()
    def set_input_scale(self, scale: Tensor | None) -> None:
        """Set the factors of the input's channels; the weight's ranges and integers must be chosen after that.

        Args:
            scale: positive [C_in]; factors of 1 alone are the same as None, no scale.

        Raises:
            ValueError: another number of factors, or some that are not positive and finite.
        """
        if scale is not None:
            if tuple(scale.shape) != (self.in_channels,):
                raise ValueError(f"{tuple(scale.shape)} factors for a weight of shape {tuple(self.weight.shape)}")
            if not (torch.isfinite(scale) & (scale > 0)).all():
                raise ValueError("factors of an input's channels must be positive and finite")
            scale = None if (scale == 1).all() else scale.detach()
        if scale is not None:
            device = scale.device if self.weight.is_meta else self.weight.device
            scale = scale.to(device, torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        self.input_scale = scale
        self.drop_dequantized()

    def _modulated(self, x: Tensor) -> Tensor:
        """Return o + W·Q(x − â), with â and o carried from step to step; the first step computes W·x + b."""
        if self.memory is None:
            raise RuntimeError("a modulated layer needs a trajectory; open `with qnn.trajectory():` once per batch")
        if not self.memory.is_empty:
            return self.memory.advance(x, *self._product(self.memory.difference(x), self.act_quantizers, None))
        if len(self.first_quantizers) > 0:
            return self.memory.begin(*self._product(x, self.first_quantizers, self.bias))
        return self.memory.begin(x, self.apply_weight(x, self._current_weight(), self.bias))

    def _product(self, x: Tensor, quantizers: nn.ModuleList, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return Q(x) and W·Q(x) + b."""
        if self.multiplies_integers:
            levels = self._levels(x, quantizers)
            values = torch.cat([part.values() for part in levels], dim=self.channel_dim)
            return values, self._integer_product(levels, bias).to(x.dtype)
        values = self._quantized(x, quantizers)
        return values, self.apply_weight(values, self._current_weight(), bias)

    def _current_weight(self) -> Tensor:
        """Return the weight for the layer's current mode, in floating point."""
        if self.weights_quantized:
            return self.quantized_weight()
        return self.weight_to_quantize() if self.acts_quantized else self.float_weight()

    def _current_bias(self) -> Tensor | None:
        """Return the bias for a call with the input in float; the float layer's in the float network."""
        return self.bias if self.in_quantized_network or self.float_bias is None else self.float_bias

    @torch.no_grad()
    def set_quantized_bias(self, bias: Tensor) -> None:
        """Set the bias of the quantized layer; in float, the layer keeps its own.

        Args:
            bias: [C_out], for a layer that has a bias.
        """
        if self.float_bias is None and not torch.equal(bias, self.bias):
            self.float_bias = self.bias.detach().clone()
        self.bias.copy_(bias)

    @torch.no_grad()
    def discard_calibration(self) -> None:
        """Forget ranges, integers, the input scale and a corrected bias; what is computed in float stays.

        Raises the errors of `float_weight`; nothing is changed then.
        """
        self.float_weight()
        self.set_input_scale(None)
        if self.float_bias is not None:
            self.bias.copy_(self.float_bias)
            self.float_bias = None
        for quantizer in (*self.act_quantizers, *self.weight_quantizers):
            quantizer.reset()
        if len(self.weight_quantizers):
            self.weight_int.zero_()

    def release_float_weight(self) -> None:
        super().release_float_weight()
        self._drop_float_bias()

    def pack(self, stream: Tensor | None = None) -> None:
        super().pack(stream)
        self._drop_float_bias()

    def _drop_float_bias(self) -> None:
        if self.form in (WeightForm.RELEASED, WeightForm.PACKED):
            self.float_bias = None

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args, **kwargs) -> None:
        # Only some layers have these tensors, so their places are made or removed before they are loaded.
        self.float_bias = torch.empty_like(self.bias) if f"{prefix}float_bias" in state else None
        self.first_token = FirstToken.place_for(state, f"{prefix}first_token.", self.weight.device)
        scale = state.get(f"{prefix}input_scale")
        self.input_scale = None if scale is None else torch.empty_like(scale, device=self.weight.device)
        super()._load_from_state_dict(state, prefix, *args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True) -> QuantModule:
        """Move or convert the module, but keep ``input_scale`` in at least float32, as step sizes."""
        scale, self.input_scale = self.input_scale, None
        super()._apply(fn, recurse)
        self.input_scale = None if scale is None else kept_wide(fn)(scale)
        return self

    def assert_multiplies_integers(self, name: str) -> None:
        """Raise a `UserError` with the layer's name if `qdiff.kernels.integer_matmul` cannot compute it."""
        if self.geometry is not None and (self.geometry.groups != 1 or isinstance(self.geometry.padding, str)):
            raise UserError(
                f"{name} has {self.geometry.groups} groups and padding {self.geometry.padding}, but integer products "
                "need 1 group and numeric padding; run this network simulated"
            )

    @property
    def multiplies_integers(self) -> bool:
        """Whether quantized inputs and the weight are multiplied as integers (`qdiff.kernels.integer_matmul`)."""
        return self.weights_quantized and self.packed is not None and self.packed.multiplies_integers

    def _levels(self, x: Tensor, quantizers: nn.ModuleList) -> list[Levels]:
        """Return the integers of the input, one per slice."""
        return [q.levels(part) for q, part in zip(quantizers, x.split(self.slices, self.channel_dim), strict=True)]

    def _integer_product(self, levels: list[Levels], bias: Tensor | None) -> Tensor:
        """Return W·Q(x) + b; slices have different step sizes, so their products are summed in floating point."""
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

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the float layer's output with the given weight and bias.

        Args:
            x: [N, …, C_in] for a linear layer, [N, C_in, …] for a convolution.
            weight: [C_out, C_in, …].
            bias: [C_out], or None.
        """
        if self.geometry is None:
            return F.linear(x, weight, bias)
        convolve = F.conv1d if weight.dim() == 3 else F.conv2d
        where = self.geometry
        return convolve(x, weight, bias, where.stride, where.padding, where.dilation, where.groups)

    @property
    def groups(self) -> int:
        """Number of groups of a convolution; 1 for a linear layer."""
        return 1 if self.geometry is None else self.geometry.groups

    @property
    def in_channels(self) -> int:
        """Number of channels of an input."""
        return self.weight.shape[1] * self.groups

    @property
    def channel_dim(self) -> int:
        """The dimension of an input that holds its channels."""
        return -1 if self.geometry is None else 1  # linear layers keep channels last

    def _quantized(self, x: Tensor, quantizers: nn.ModuleList) -> Tensor:
        if len(self.slices) == 1:
            return quantizers[0](x)
        dim = self.channel_dim
        parts = x.split(self.slices, dim=dim)
        return torch.cat([q(part) for q, part in zip(quantizers, parts, strict=True)], dim=dim)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, slices={self.slices}"


def _geometry_of(layer: nn.Module) -> Geometry | None:
    """Return the geometry of a convolution (where its kernel is applied); None for a linear layer."""
    if isinstance(layer, nn.Linear):
        return None
    return Geometry(layer.stride, layer.padding, layer.dilation, layer.groups)
