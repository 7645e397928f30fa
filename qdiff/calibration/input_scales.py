"""How much of its range each input channel of a layer hands to the weight: τ, for y = Q(x/τ)·Q(τ·W).

Three ways to find τ [C_in] of one layer: the closed form of DilateQuant (Liu et al., arXiv 2409.14307), a search over
powers of the channels' largest values (as SmoothQuant and SVDQuant do), and learning (DMQ, Lee et al., ICCV 2025).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice

import torch
from torch import Tensor

from qdiff.calibration.feeding import Feeding
from qdiff.calibration.reconstruction import random_batches
from qdiff.errors import UserError
from qdiff.functional import at_least_single, fake_quantize
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import ActQuantizer, DynamicActQuantizer, WeightQuantizer
from qdiff.ranges.qparams import TINY, qparams


class Scaling(str, Enum):
    """How the τ of a layer is found."""

    NONE = "none"  # no layer is scaled
    DILATE = "dilate"  # `dilated`
    SEARCH = "search"  # `searched`
    LEARNED = "learned"  # `learned`


@dataclass(frozen=True)
class InputScaling:
    """How layers get their τ; the defaults are no scaling, and DMQ's numbers where it is learned.

    Attributes:
        kind: see `Scaling`.
        start: where learning starts: at 1 (``none``), or at what another kind finds.
        iterations, batch_size: of learning each layer's τ.
        lr: Adam's learning rate for log τ, falling to 0 along a cosine. (The paper learns τ itself, which may pass 0.)
        weighting: r of λ = (1 − L_t/Σ L)^r, by which a timestep counts less the larger its share of the loss is; 0
            counts all alike.
    """

    kind: Scaling = Scaling.NONE
    start: Scaling = Scaling.NONE
    iterations: int = 6_000
    batch_size: int = 32
    lr: float = 1e-3
    weighting: float = 20.0

    def __post_init__(self) -> None:
        for name, option in (("kind", "--scaling"), ("start", "--scaling_start")):
            try:
                object.__setattr__(self, name, Scaling(getattr(self, name)))
            except ValueError:
                known = ", ".join(kind.value for kind in Scaling)
                raise UserError(f"{name} is {getattr(self, name)}; give {option} one of {known}") from None
        if self.start is Scaling.LEARNED:
            raise UserError("learning starts at itself; give --scaling_start another kind")
        for name, option in (("iterations", "--scaling_iters"), ("batch_size", "--cali_batch_size")):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give {option} at least 1")
        if not (0 < self.lr < math.inf):
            raise UserError(f"lr is {self.lr}; give a finite number above 0")
        if not (0 <= self.weighting < math.inf):
            raise UserError(f"weighting is {self.weighting}; give --scaling_weighting a finite number of at least 0")


POWERS = 10  # the search tries multiples of 1/10
MOMENTUM = 0.95  # of the running loss at a timestep


def scaled_product(layer: QuantModule, x: Tensor, tau: Tensor) -> Tensor:
    """Return Q(x/τ)·Q(τ·W); a factor for which the layer has no quantizer stays in float.

    Ranges are the extremes of the batch, and of each output channel of the weight. Rounding passes gradients straight
    through, and a range passes them on to the values that set it.

    Args:
        x: a batch of inputs, in the shape that the layer takes.
        tau: positive [C_in].
    """
    scale = 1 / tau
    x, weight = layer.times_channels(x, scale), layer.weight_over(scale)
    if len(layer.act_quantizers):
        parts = [x] if len(layer.slices) == 1 else x.split(layer.slices, layer.channel_dim)
        quantized = [_quantized_input(part, q) for part, q in zip(parts, layer.act_quantizers, strict=True)]
        x = torch.cat(quantized, layer.channel_dim)
    if len(layer.weight_quantizers):
        parts = zip(weight.split(layer.slices, 1), layer.weight_quantizers, strict=True)
        weight = torch.cat([_quantized_weight(part, q) for part, q in parts], 1)
    return layer.apply_weight(x, weight, None)


def _quantized_input(x: Tensor, quantizer: ActQuantizer) -> Tensor:
    if isinstance(quantizer, DynamicActQuantizer):
        grid = quantizer.range_of(x)
    else:
        grid = qparams(x.amin(), x.amax(), quantizer.bits, quantizer.symmetric)
    return fake_quantize(x, *grid, quantizer.bits)


def _quantized_weight(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    over = tuple(range(1, weight.dim()))
    low, high = weight.amin(over, keepdim=True), weight.amax(over, keepdim=True)
    return fake_quantize(weight, *qparams(low, high, quantizer.bits, quantizer.symmetric), quantizer.bits)


def product_errors(layer: QuantModule, x: Tensor, tau: Tensor) -> Tensor:
    """Return the squared error of `scaled_product` for each sample: summed over channels, averaged over positions."""
    wanted = layer.apply_weight(x, layer.float_weight(), None)
    squares = (scaled_product(layer, x, tau) - wanted).square().sum(layer.channel_dim)
    return squares.reshape(len(x), -1).mean(1)


@torch.no_grad()
def dilated(layer: QuantModule) -> Tensor:
    """Return DilateQuant's τ, the largest that leaves the range of every output channel of the weight as it is.

    Channels that hold an output channel's largest or smallest weight keep 1, and so do channels without weights.
    """
    weight, found = _by_group(layer), []
    for part in weight.split(layer.slices, 2):
        tau = torch.full_like(part[:, :1, :, :1], torch.inf)
        for signed in (part, -part):
            most = signed.amax((2, 3), keepdim=True).clamp(min=0)
            own = signed.amax(3, keepdim=True).clamp(min=0)
            room = torch.where(own > 0, most / own, torch.inf)
            tau = torch.minimum(tau, room.amin(1, keepdim=True))
        found.append(torch.where(tau.isfinite(), tau, 1.0).squeeze(3).squeeze(1))
    return torch.cat(found, 1).flatten()


@torch.no_grad()
def searched(layer: QuantModule, largest: Tensor, batches: Sequence[Tensor]) -> Tensor:
    """Return the best τ_c = max|x_c|^a / max|W_c|^b, of b = 0 and b = 1 − a, by the error of the layer's output.

    Args:
        largest: max|x_c| [C_in].
        batches: inputs in the shape that the layer takes.
    """
    x = at_least_single(largest)
    weight = _by_group(layer).abs().amax((1, 3)).flatten()
    best, least = torch.ones_like(x), torch.full((), torch.inf, device=x.device)
    powers = [i / POWERS for i in range(1, POWERS)]
    for a, b in [(0.0, 0.0), *((a, 0.0) for a in powers), *((a, 1 - a) for a in powers)]:
        tau = balanced(x.clamp(min=TINY) ** a / weight.clamp(min=TINY) ** b)
        error = torch.stack([product_errors(layer, batch, tau.to(batch.dtype)).sum() for batch in batches]).sum()
        best, least = torch.where(error < least, tau, best), torch.minimum(least, error)
    return best


def _by_group(layer: QuantModule) -> Tensor:
    """Return the float weight as [G, C_out/G, C_in/G, taps]."""
    weight = at_least_single(layer.float_weight().detach())
    return weight.reshape(layer.groups, -1, weight.shape[1], weight[0, 0].numel())


def balanced(tau: Tensor) -> Tensor:
    """Return τ divided by its geometric mean: a factor common to all channels changes nothing."""
    return tau / tau.log().mean().exp()


def learned(
    layer: QuantModule,
    inputs: Tensor,
    entries: Tensor,
    start: Tensor,
    settings: InputScaling,
    generator: torch.Generator,
    feeding: Feeding,
    on_iteration: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the τ that has learned to keep the layer's output, on its inputs in the float network.

    Args:
        inputs: [N, …], in the shape that the layer takes.
        entries: [N] int64, which timestep each belongs to, from 0 on.
        start: τ to begin with.
        generator: decides the batches.
        feeding: how inputs get to the layer.
    """
    batches = random_batches(len(inputs), settings.batch_size, settings.iterations, generator)
    log_tau = at_least_single(start).log().requires_grad_(True)
    running = torch.zeros(int(entries.max()) + 1, dtype=log_tau.dtype, device=feeding.device)
    passes = len(feeding.pass_counts(batches.shape[1]))
    # λ knows the losses of the whole batch, so one that goes through in parts does so twice: for losses, for gradients.
    rows = batches.repeat_interleave(2, 0) if passes > 1 else batches

    def errors_of(x: Tensor) -> Tensor:
        return product_errors(layer, x, log_tau.exp().to(x.dtype))

    with torch.enable_grad(), contextlib.closing(feeding.passes((inputs, entries), rows)) as samples:
        optimiser = torch.optim.Adam([log_tau], lr=settings.lr)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=settings.iterations)
        for _ in range(settings.iterations):
            optimiser.zero_grad(set_to_none=True)
            if passes > 1:
                with torch.no_grad():
                    running = _moved(running, [(entry, errors_of(x)) for x, entry in islice(samples, passes)])
            for x, entry in islice(samples, passes):
                errors = errors_of(x)
                if passes == 1:
                    running = _moved(running, [(entry, errors.detach())])
                ((_weights(running, settings.weighting)[entry] * errors).sum() / batches.shape[1]).backward()
            optimiser.step()
            cosine.step()
            on_iteration()
    return balanced(log_tau.detach().exp())


def _moved(running: Tensor, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the running losses after a batch, of which there are the timesteps and the losses of the samples."""
    sums = torch.zeros_like(running)
    for entry, losses in found:
        sums.index_add_(0, entry, losses.to(sums.dtype))
    return MOMENTUM * running + (1 - MOMENTUM) * sums


def _weights(running: Tensor, power: float) -> Tensor:
    """Return λ of every timestep from the running sums of its losses."""
    return (1 - running / running.sum().clamp(min=TINY)) ** power
