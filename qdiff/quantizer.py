"""Quantizers: modules that hold a step size, a zero point and whether they were set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdiff.config import QuantConfig, ScalePer
from qdiff.functional import fake_quantize, fake_quantize_inference, quantize
from qdiff.kernels.integer_matmul import Levels
from qdiff.ranges.qparams import qparams
from qdiff.ranges.range_estimator import RangeEstimator


class Quantizer(nn.Module):
    """State of a uniform affine quantizer; everything is registered from construction.

    Args:
        bits: width.
        symmetric: the zero point stays in the middle of the levels.
        unsigned: the input is never negative (softmax): the zero point stays 0.
        shape: shape of δ and z; () is one for the whole tensor.

    State: ``delta`` float32 (float64 after `double`; half precision does not narrow it), ``zero_point`` int32,
    ``initialised`` bool.
    """

    def __init__(self, bits: int, symmetric: bool = False, unsigned: bool = False, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self.unsigned = unsigned
        self.delta = nn.Parameter(torch.ones(shape), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def set(self, delta: Tensor, zero_point: Tensor) -> None:
        """Take over a step size and a zero point of the right shape."""
        self.delta.copy_(delta)
        self.zero_point.copy_(zero_point)
        self.initialised.fill_(True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Move or convert; a step size stays in float32 at least: that of 16 bits is hardly a float16 number."""

        def kept_wide(t: Tensor) -> Tensor:
            made = fn(t)
            narrowed = t.is_floating_point() and made.element_size() < torch.float32.itemsize
            return t.to(made.device) if narrowed else made

        return super()._apply(kept_wide, recurse)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}, unsigned={self.unsigned}"


class ActQuantizer(Quantizer):
    """Quantizes a tensor on its way through the network, or watches it to choose a range.

    Attributes:
        fired: how often it quantized (not state: counts since construction or the last reset).
        observer: while set, values pass unchanged and are recorded.
        dropping: while set, decides which elements stay in float (QDrop); only while something is learned.
    """

    def __init__(self, bits: int, symmetric: bool = False, unsigned: bool = False) -> None:
        super().__init__(bits, symmetric, unsigned)
        self.fired = 0
        self.observer: RangeEstimator | None = None
        self.dropping: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.update(x)
            return x
        self.fired += 1
        delta, zero_point = self.range_of(x)
        if torch.is_grad_enabled() and (delta.requires_grad or x.requires_grad):
            y = fake_quantize(x, delta, zero_point, self.bits)
            return y if self.dropping is None else self.dropping(y, x)
        return fake_quantize_inference(x, delta, zero_point, self.bits)

    def levels(self, x: Tensor) -> Levels:
        """Return the integers of which `forward` returns the values; without gradients, and nothing is watched."""
        self.fired += 1
        delta, zero_point = self.range_of(x)
        return Levels(quantize(x, delta, zero_point, self.bits), delta, zero_point, self.bits)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the δ and z by which a tensor is quantized; they broadcast against it."""
        return self.delta, self.zero_point

    def settle(self) -> None:
        """End observing: take the range of what was seen."""
        self.set(*self.observer.qparams(self.bits, self.symmetric, self.unsigned))
        self.observer = None


class DynamicActQuantizer(ActQuantizer):
    """Has a dynamic range, computed from the tensor at every call; gradients do not flow.

    Args:
        scale_per: what shares a range.
        channel_dim: dimension of the channels in the tensors that come.
    """

    def __init__(self, bits: int, symmetric: bool, unsigned: bool, scale_per: ScalePer, channel_dim: int) -> None:
        super().__init__(bits, symmetric, unsigned)
        self.scale_per, self.channel_dim = scale_per, channel_dim
        self.initialised.fill_(True)  # there is nothing to set

    def forward(self, x: Tensor) -> Tensor:
        self.fired += 1
        return fake_quantize_inference(x, *self.range_of(x), self.bits)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = {ScalePer.TENSOR: None, ScalePer.SAMPLE: 0, ScalePer.CHANNEL: self.channel_dim % x.dim()}[self.scale_per]
        over = [d for d in range(x.dim()) if d != kept]
        low, high = x.amin(over, keepdim=kept is not None), x.amax(over, keepdim=kept is not None)
        if self.scale_per is ScalePer.TENSOR:
            low, high = low.double(), high.double()  # as published, where one range is a pair of Python's numbers
        delta, zero_point = qparams(low, high, self.bits, self.symmetric, self.unsigned)
        return delta.to(x.dtype), zero_point


def calibrated_act_quantizers(module: nn.Module) -> dict[str, ActQuantizer]:
    """Return the activation quantizers inside a module whose range is state, not dynamic."""
    named = module.named_modules()
    return {n: m for n, m in named if isinstance(m, ActQuantizer) and not isinstance(m, DynamicActQuantizer)}


class WeightQuantizer(Quantizer):
    """Per-output-channel δ and z [C, 1, …] of a weight or of one slice of it."""

    def __init__(self, bits: int, symmetric: bool, weight: Tensor) -> None:
        super().__init__(bits, symmetric, shape=(weight.shape[0], *[1] * (weight.dim() - 1)))


def act_quantizer(config: QuantConfig, bits: int, symmetric: bool, unsigned: bool, channel_dim: int) -> ActQuantizer:
    """Return a quantizer of the kind that a config asks for.

    Args:
        channel_dim: see `DynamicActQuantizer`.
    """
    if config.act_dynamic:
        return DynamicActQuantizer(bits, symmetric, unsigned, config.act_scale_per, channel_dim)
    return ActQuantizer(bits, symmetric, unsigned)
