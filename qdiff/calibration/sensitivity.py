"""The sensitivity of a network to one layer's width: that layer is quantized, everything else is in float."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor, nn

from qdiff.config import ActRanges, QuantConfig
from qdiff.modes import set_modes
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import calibrated_act_quantizers
from qdiff.ranges.estimators import ESTIMATORS, RangeMethod
from qdiff.ranges.first_token import FirstToken
from qdiff.wrapping import layer_places

SQNR_CAP = 200.0  # dB; that of an output without an error is infinite, which JSON cannot hold


class Measure(str, Enum):
    """What is compared with the float network's."""

    SQNR = "sqnr"  # ε, as the ratio of signal and quantization noise in dB
    PROBE = "probe"  # likewise, estimated for all layers at once (`qdiff.calibration.probed_sensitivity`)
    TRAJECTORY = "trajectory"  # likewise of the sampler's result (`qdiff.calibration.trajectory_sensitivity`)
    SSIM = "ssim"  # images of the same noise

    def loss(self, value: float) -> float:
        """Return what is summed over layers: noise relative to the signal, or what SSIM lacks of 1.

        Noise of several layers adds up as far as it is independent; decibels do not.
        """
        return max(0.0, 1 - value) if self is Measure.SSIM else 10 ** (-value / 10)


class Operand(str, Enum):
    """Which operand of a layer's product is quantized."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"


def sqnr(signal: float, noise: float) -> float:
    """Return the ratio of two sums of squares in dB: `SQNR_CAP` without noise, and -`SQNR_CAP` if it is not finite."""
    if noise == 0:
        return SQNR_CAP
    if not (math.isfinite(noise) and signal > 0):
        return -SQNR_CAP
    return max(-SQNR_CAP, min(SQNR_CAP, 10 * (math.log10(signal) - math.log10(noise))))


class OutputQuality:
    """SQNR of a network's output, against what it computed when this was made.

    Args:
        network: the float network.
        inputs: its inputs, batch first.
        batch_size: samples per call.
    """

    def __init__(self, network: Callable[..., Tensor], inputs: Sequence[Tensor], batch_size: int) -> None:
        device = next(network.parameters()).device
        self.network = network
        self.batches = list(zip(*(part.to(device).split(batch_size) for part in inputs), strict=True))
        with torch.no_grad():
            self.wanted = [network(*batch).double() for batch in self.batches]
        self._signal = float(sum(wanted.square().sum() for wanted in self.wanted))

    @torch.no_grad()
    def __call__(self) -> float:
        """Return 10·log₁₀(Σ ε² / Σ (ε̂ − ε)²) of the network as it is now, in dB, at most `SQNR_CAP`."""
        noises = (self.network(*b).double() - w for b, w in zip(self.batches, self.wanted, strict=True))
        return sqnr(self._signal, float(sum(noise.square().sum() for noise in noises)))


@torch.no_grad()
def layer_sensitivity(
    network: nn.Module,
    name: str,
    config: QuantConfig,
    operand: Operand,
    widths: Sequence[int],
    quality: Callable[[], float],
    first_token: FirstToken | None = None,
) -> dict[int, float] | None:
    """Return the quality of a network by the width of one operand of one layer; None if the layer is never called.

    Weights are rounded to nearest, and ranges are those of the config's estimators; ranges of activations come from
    the calls that ``quality`` makes, where an average gives way to a search (`start_observing`), and are shared by all
    timesteps.

    Args:
        network: the float network; it is unchanged afterwards.
        name: a name in `qdiff.wrapping.layer_places`.
        config: how ranges are chosen, and what is split; with a width for this operand.
        quality: runs the network as it is, and returns its quality.
        first_token: of the layer (`qdiff.calibration.first_token`), which is not quantized; None quantizes all tokens.
    """
    found = {}
    for bits in widths:
        with _replaced(network, name, config_of_one(config, name, operand, bits)) as layer:
            layer.first_token = first_token
            seen: list[object] = []
            handle = layer.register_forward_pre_hook(lambda *_, seen=seen: seen.append(None))
            if operand is Operand.WEIGHTS:
                layer.init_weight_ranges(config.weight_range)
            else:
                _observe(layer, config.act_range, quality)
            found[bits] = quality()
            handle.remove()
        if not seen:
            return None
    return found


def config_of_one(config: QuantConfig, name: str, operand: Operand, bits: int) -> QuantConfig:
    """Return the config of one layer with one operand quantized and the other in float.

    Ranges of activations are shared by all timesteps, whatever the config says: ranges per timestep would be observed
    timestep by timestep, and a float network, in which the layer is, does not tell its layers the timestep.

    Args:
        config: how ranges are chosen, and what is split; with a width for this operand.
        name: the layer's.
        operand: the quantized one.
        bits: its width.
    """
    words = f"W{bits}A32" if operand is Operand.WEIGHTS else f"W32A{bits}"
    own = replace(config, keep_ends=False, act_ranges=ActRanges.SHARED, layer_bits={name: words})
    return own.of_layer(name, None)


@contextlib.contextmanager
def _replaced(network: nn.Module, name: str, config: QuantConfig) -> Iterator[QuantModule]:
    """Have one layer of a float network quantized inside the block, wherever it is used."""
    places = layer_places(network)[name]
    before = [parent._modules[attribute] for parent, attribute in places]
    layer = QuantModule(before[0], config).to(before[0].weight.device).eval()
    set_modes(layer, weights=True, activations=True)
    try:
        for parent, attribute in places:
            setattr(parent, attribute, layer)
        yield layer
    finally:
        for (parent, attribute), module in zip(places, before, strict=True):
            setattr(parent, attribute, module)


def _observe(layer: QuantModule, method: str, run: Callable[[], float]) -> None:
    """Set the ranges of a layer's input from what passes while the network runs; dynamic ranges need none."""
    if not calibrated_act_quantizers(layer):
        return
    start_observing(layer, method)
    run()
    settle_observed(layer)


def quick_range(method: str, bits: int) -> str:
    """Return the range method for an estimate: above 4 bits, searching for a range takes long and changes little."""
    searches = RangeMethod.MSE, RangeMethod.SEARCH, RangeMethod.AVERAGE, RangeMethod.QUICK
    return RangeMethod.MIN_MAX if bits > 4 and method in searches else method


def start_observing(layer: QuantModule, method: str) -> None:
    """Have the quantizers of a layer's input watch what passes, for ranges by a method of `ESTIMATORS`.

    An average over batches, which must come in random order, gives way to one search over all of them: calls come in
    the order of the sampler, and an average would mostly be the range of the first few.
    """
    estimator = ESTIMATORS[RangeMethod.MSE if ESTIMATORS[method].averages else method]
    for quantizer in calibrated_act_quantizers(layer).values():
        quantizer.observer = estimator(None)


def settle_observed(layer: QuantModule) -> None:
    """Set the ranges from what passed; a layer that was never called has none."""
    for quantizer in calibrated_act_quantizers(layer).values():
        if quantizer.observer.low is None:
            quantizer.observer = None
        else:
            quantizer.settle()
