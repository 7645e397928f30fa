"""Quantizers: modules that hold a step size, a zero point and a flag that says whether these are set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.config import ActRanges, QuantConfig, ScalePer
from qdiff.functional import fake_quantize, fake_quantize_inference, finer, quantize
from qdiff.kernels.integer_matmul import Levels
from qdiff.ranges.calibrated_timesteps import CalibratedTimesteps
from qdiff.ranges.qparams import qparams
from qdiff.ranges.range_estimator import Observer


class Quantizer(nn.Module):
    """State of a uniform affine quantizer; all buffers are registered at construction.

    Args:
        bits: width.
        symmetric: the zero point stays in the middle of the levels.
        unsigned: the input is never negative (softmax), so the zero point stays 0.
        shape: shape of δ and z; () is one pair for the whole tensor.

    State: ``delta`` float32 (float64 after `double`; conversion to half precision leaves it in float32),
    ``zero_point`` int32, ``initialised`` bool.
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
        """Set the step size and the zero point; both must have the quantizer's shape."""
        self.delta.copy_(delta)
        self.zero_point.copy_(zero_point)
        self.initialised.fill_(True)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget the range, as at construction."""
        self.delta.fill_(1)
        self.zero_point.zero_()
        self.initialised.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Move or convert the module, but keep δ in at least float32: 16-bit step sizes underflow in float16."""
        return super()._apply(kept_wide(fn), recurse)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, symmetric={self.symmetric}, unsigned={self.unsigned}"


def kept_wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what moves or converts a tensor as ``fn`` does, but leaves floats in at least float32."""

    def moved(t: Tensor) -> Tensor:
        made = fn(t)
        narrowed = t.is_floating_point() and made.element_size() < torch.float32.itemsize
        return t.to(made.device) if narrowed else made

    return moved


class ActQuantizer(Quantizer):
    """Quantizes an activation tensor, or observes it to choose a range.

    Args:
        channels: number of channels, the second dimension of tensors, that may have finer step sizes; None for none.

    State: ``channel_shifts`` uint8 [1, C] if there are ``channels``: k of a channel's step size δ/2^k.

    Attributes:
        fired: how often it has quantized since construction or the last reset (not part of the state).
        observer: while set, values pass unchanged and are recorded.
        dropping: while set, decides which elements stay in float (QDrop); used only during reconstruction.
    """

    def __init__(self, bits: int, symmetric: bool = False, unsigned: bool = False, channels: int | None = None) -> None:
        super().__init__(bits, symmetric, unsigned)
        shifts = None if channels is None else torch.zeros(1, channels, dtype=torch.uint8)
        self.register_buffer("channel_shifts", shifts)
        self.fired = 0
        self.observer: Observer | None = None
        self.dropping: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer.update(x)
            return x
        self.fired += 1
        delta, zero_point = self.range_of(x)
        if torch.is_grad_enabled() and (delta.requires_grad or x.requires_grad or self.dropping is not None):
            y = fake_quantize(x, delta, zero_point, self.bits)
            return y if self.dropping is None else self.dropping(y, x)
        return fake_quantize_inference(x, delta, zero_point, self.bits)

    def levels(self, x: Tensor) -> Levels:
        """Return the integers behind the values that `forward` returns, without gradients and without observing."""
        self.fired += 1
        (delta, zero_point), shifts = self.tensor_range_of(x), self.shifts_of(x)
        return Levels(quantize(x, finer(delta, shifts), zero_point, self.bits), delta, zero_point, self.bits, shifts)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the δ and z that quantize a tensor; they broadcast against it."""
        delta, zero_point = self.tensor_range_of(x)
        return finer(delta, self.shifts_of(x)), zero_point

    def tensor_range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `range_of` before channels get finer step sizes."""
        return self.delta, self.zero_point

    def shifts_of(self, x: Tensor) -> Tensor | None:
        """Return k for the channels of a tensor, which broadcasts against it."""
        if self.channel_shifts is None:
            return None
        shifts = self.channel_shifts[self._rows_of(x)]
        return shifts.view(*shifts.shape, *[1] * (x.dim() - 2))

    def _rows_of(self, x: Tensor) -> Tensor | slice:
        """Return the entry of tables for each sample."""
        return slice(None)

    @torch.no_grad()
    def set(self, delta: Tensor, zero_point: Tensor, shifts: Tensor | None = None) -> None:
        """Set the range, and the shifts of all channels; None sets these to 0."""
        super().set(delta, zero_point)
        if shifts is not None:
            self.channel_shifts.copy_(shifts)
        elif self.channel_shifts is not None:
            self.channel_shifts.zero_()

    def reset(self) -> None:
        super().reset()
        if self.channel_shifts is not None:
            self.channel_shifts.zero_()

    def settle(self) -> None:
        """End observing and set the range from the observed values."""
        self.set(*self.observer.qparams(self.bits, self.symmetric, self.unsigned))
        self.observer = None


class DynamicActQuantizer(ActQuantizer):
    """Quantizes with a dynamic range, computed from the tensor at every call; gradients do not flow.

    Args:
        scale_per: what shares one range.
        channel_dim: channel dimension of the tensors.
    """

    def __init__(self, bits: int, symmetric: bool, unsigned: bool, scale_per: ScalePer, channel_dim: int) -> None:
        super().__init__(bits, symmetric, unsigned)
        self.scale_per, self.channel_dim = scale_per, channel_dim
        self.initialised.fill_(True)  # no range has to be set

    def reset(self) -> None:
        """Do nothing: no range is kept."""

    def forward(self, x: Tensor) -> Tensor:
        self.fired += 1
        return fake_quantize_inference(x, *self.range_of(x), self.bits)

    def tensor_range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = {ScalePer.TENSOR: None, ScalePer.SAMPLE: 0, ScalePer.CHANNEL: self.channel_dim % x.dim()}[self.scale_per]
        over = [d for d in range(x.dim()) if d != kept]
        low, high = x.amin(over, keepdim=kept is not None), x.amax(over, keepdim=kept is not None)
        if self.scale_per is ScalePer.TENSOR:
            low, high = low.double(), high.double()  # the published code uses Python floats for a single range
        delta, zero_point = qparams(low, high, self.bits, self.symmetric, self.unsigned)
        return delta.to(x.dtype), zero_point


class TimestepActQuantizer(ActQuantizer):
    """Quantizes with a range of its own at each calibrated timestep; no gradients reach these ranges.

    Args:
        args, keywords: those of `ActQuantizer`.

    State: ``delta`` and ``zero_point`` are tables [T], and ``channel_shifts`` is one [T, C], in the order of
    ``timesteps.values``; empty before calibration.

    Attributes:
        timesteps: shared by all quantizers of a network (`share_timesteps`).
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._timesteps = [CalibratedTimesteps()]  # in a list, because it is shared and not a part of this module
        self.resize(0)

    @property
    def timesteps(self) -> CalibratedTimesteps:
        return self._timesteps[0]

    def resize(self, count: int) -> None:
        """Make place for the ranges of ``count`` timesteps, none of which is set."""
        self.delta = nn.Parameter(self.delta.new_ones(count), requires_grad=False)
        self.zero_point = self.zero_point.new_zeros(count)
        if self.channel_shifts is not None:
            self.channel_shifts = self.channel_shifts.new_zeros(count, self.channel_shifts.shape[1])
        self.initialised.fill_(False)

    def reset(self) -> None:
        self.resize(0)

    def set(self, delta: Tensor, zero_point: Tensor, shifts: Tensor | None = None) -> None:
        """Set the whole table: δ and z [T], shifts [T, C]."""
        if delta.shape != self.delta.shape:
            self.resize(len(delta))
        super().set(delta, zero_point, shifts)

    @torch.no_grad()
    def settle_entry(self, entry: int) -> None:
        """End observing and set one entry from the observed values; `finish` follows the last."""
        delta, zero_point = self.observer.qparams(self.bits, self.symmetric, self.unsigned)
        self.delta[entry], self.zero_point[entry] = delta, zero_point
        if self.channel_shifts is not None:
            self.channel_shifts[entry] = 0
        self.observer = None

    def finish(self) -> None:
        """Mark the table as set."""
        self.initialised.fill_(True)

    def tensor_range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, shape = self._rows_of(x), (-1, *[1] * (x.dim() - 1))
        return self.delta[rows].view(shape), self.zero_point[rows].view(shape)

    def _rows_of(self, x: Tensor) -> Tensor:
        return self.timesteps.rows_of(x)

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args, **kwargs) -> None:
        stored = state.get(f"{prefix}delta")
        if stored is not None and stored.shape != self.delta.shape:
            self.resize(len(stored))
        super()._load_from_state_dict(state, prefix, *args, **kwargs)


def share_timesteps(network: nn.Module) -> CalibratedTimesteps | None:
    """Give all quantizers of a network with ranges per timestep the same timesteps; None if there are no such ones."""
    quantizers = [m for m in network.modules() if isinstance(m, TimestepActQuantizer)]
    if not quantizers:
        return None
    shared = CalibratedTimesteps().to(quantizers[0].delta.device)
    for quantizer in quantizers:
        quantizer._timesteps = [shared]
    return shared


def calibrated_act_quantizers(module: nn.Module) -> dict[str, ActQuantizer]:
    """Return the activation quantizers inside a module whose range is state, not dynamic."""
    named = module.named_modules()
    return {n: m for n, m in named if isinstance(m, ActQuantizer) and not isinstance(m, DynamicActQuantizer)}


def learnable_act_quantizers(module: nn.Module) -> list[ActQuantizer]:
    """Return the activation quantizers inside a module whose step size can be learned: one for all timesteps."""
    return [q for q in calibrated_act_quantizers(module).values() if not isinstance(q, TimestepActQuantizer)]


class WeightQuantizer(Quantizer):
    """Per-output-channel δ and z [C, 1, …] of a weight or of one slice of it."""

    def __init__(self, bits: int, symmetric: bool, weight: Tensor) -> None:
        super().__init__(bits, symmetric, shape=(weight.shape[0], *[1] * (weight.dim() - 1)))


def act_quantizer(
    config: QuantConfig, bits: int, symmetric: bool, unsigned: bool, channel_dim: int, channels: int | None = None
) -> ActQuantizer:
    """Return an activation quantizer with a dynamic or a calibrated range, as the config asks.

    Args:
        channel_dim, channels: see `DynamicActQuantizer` and, of calibrated ranges, `ActQuantizer`.
    """
    if config.act_dynamic:
        return DynamicActQuantizer(bits, symmetric, unsigned, config.act_scale_per, channel_dim)
    kind = TimestepActQuantizer if config.act_ranges is ActRanges.TIMESTEP else ActQuantizer
    return kind(bits, symmetric, unsigned, channels)
