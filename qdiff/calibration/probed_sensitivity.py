"""The sensitivity of a network to every layer's width at once, from random projections of its output.

Rounding adds a noise n to an operand of one layer, and, to first order, J·n to the output, where J is the output's
derivative by that operand. For a random v with independent entries of mean 0 and variance 1, E (v·J·n)² = |J·n|², and
v·J = Jᵀv is what one backward pass from v·ε gives for all layers (Hutchinson's estimator). So a forward and a backward
pass per batch stand in for a forward pass per layer and width (`qdiff.calibration.sensitivity`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from qdiff.calibration.feeding import to_device
from qdiff.calibration.sensitivity import (
    Operand,
    config_of_one,
    quick_range,
    settle_observed,
    sqnr,
    start_observing,
)
from qdiff.config import QuantConfig
from qdiff.modes import set_modes
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import calibrated_act_quantizers
from qdiff.ranges.first_token import FirstToken
from qdiff.wrapping import layer_places

Found = dict[str, dict[int, float] | None]
"""SQNR in dB by layer and width; None for a layer that is never called."""
_Inputs = tuple[Tensor, ...]


def probed_sensitivities(
    network: nn.Module,
    names: Mapping[Operand, Sequence[str]],
    widths: Mapping[Operand, Sequence[int]],
    config: QuantConfig,
    inputs: Sequence[Tensor],
    batch_size: int,
    generator: torch.Generator,
    first_tokens: Mapping[str, FirstToken] = MappingProxyType({}),
) -> dict[Operand, Found]:
    """Estimate the SQNR of the output by the width of one operand of one layer, for all layers and widths together.

    Weights are rounded to nearest. Ranges of activations are observed on these inputs and shared by all timesteps. Up
    to 4 bits, ranges come from the config's estimators, where an average gives way to a search (`start_observing`);
    above, where a search changes little, from the extremes (`quick_range`).

    Args:
        network: the float network; it is unchanged afterwards.
        names: layers of `qdiff.wrapping.layer_places`, by operand.
        widths: in bits, by operand.
        config: how ranges are chosen, and what is split.
        inputs: the network's, batch first. Every sample gives one projection per layer.
        batch_size: samples per call.
        generator: of the projections, on the CPU.
        first_tokens: by layer (`qdiff.calibration.first_token`); these tokens are not quantized.

    Returns:
        10·log₁₀(Σ ε² / Σ (v·J·n)²), at most `qdiff.calibration.sensitivity.SQNR_CAP`, by operand, layer and width.
    """
    device = next(network.parameters()).device
    batches = list(zip(*(part.to(device).split(batch_size) for part in inputs), strict=True))
    places = {name: parent._modules[attribute] for name, ((parent, attribute), *_) in layer_places(network).items()}
    layers = {
        operand: {
            name: RoundedLayer(places[name], name, config, operand, widths[operand], first_tokens.get(name))
            for name in names[operand]
        }
        for operand in Operand
    }
    everything = [layer for found in layers.values() for layer in found.values()]
    observing = [layer for layer in everything if layer.observes]
    if observing:
        with torch.no_grad(), _listening(observing, observe=True):
            for batch in batches:
                network(*batch)
        for layer in observing:
            layer.settle()
    signal = torch.zeros((), dtype=torch.float64, device=device)
    with parameters_without_gradients(network), torch.enable_grad(), _listening(everything):
        for batch in batches:
            for layer in everything:
                layer.start(len(batch[0]))
            out = network(*batch)
            signal += out.detach().double().square().sum()
            if out.requires_grad:
                # Every sample has a projection of its own, so that its products are not mixed with those of others.
                (out * projection_of(out, generator)).sum().backward()
            for layer in everything:
                layer.finish()
    total = float(signal)
    return {operand: {name: layer.quality(total) for name, layer in found.items()} for operand, found in layers.items()}


@contextlib.contextmanager
def _listening(rounded: Sequence[RoundedLayer], observe: bool = False) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for one in rounded:
            if observe:
                handle = one.layer.register_forward_pre_hook(one.observe)
            elif one.operand is Operand.ACTIVATIONS:
                handle = one.layer.register_forward_pre_hook(one.on_input)
            else:
                handle = one.layer.register_forward_hook(one.on_output)
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def parameters_without_gradients(network: nn.Module) -> Iterator[None]:
    """Spare the backward pass the gradients of weights."""
    wanted = [p for p in network.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def projection_of(out: Tensor, generator: torch.Generator) -> Tensor:
    """Return v for an output, drawn by a generator of the CPU; the host does not wait for a GPU."""
    # Converted on the device: converted before, it would not be in page-locked memory.
    return to_device(torch.randn(out.shape, generator=generator), out.device).to(out.dtype)


def by_sample(rows: Tensor, samples: int, copies: int) -> Tensor:
    """Return rows [copies · samples, …] summed over the copies, [samples, …]; other rows are one sample together."""
    return rows.unflatten(0, (copies, samples)).sum(0) if len(rows) == copies * samples else rows.sum(0, keepdim=True)


def until_backward(x: Tensor) -> Callable[[], Tensor]:
    """Return what gives a tensor back in the backward pass, without a copy.

    Raises:
        RuntimeError: (when it is called) something changed the tensor in place.
    """
    values, version = x.detach(), x._version

    def get() -> Tensor:
        if values._version != version:
            raise RuntimeError("a layer's input was changed in place after the layer; its sensitivity cannot be told")
        return values

    return get


class RoundedLayer:
    """One operand of one layer, rounded to several widths beside a float forward."""

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        config: QuantConfig,
        operand: Operand,
        widths: Sequence[int],
        first_token: FirstToken | None,
    ) -> None:
        self.layer = layer
        self.operand = operand
        self.rounded: dict[int, QuantModule] = {}
        for bits in widths:
            own = config_of_one(config, name, operand, bits)
            made = QuantModule(self.layer, own).to(self.layer.weight.device).eval()
            set_modes(made, weights=True, activations=True)
            made.first_token = first_token
            if operand is Operand.WEIGHTS:
                made.init_weight_ranges(quick_range(config.weight_range, bits))
            else:
                start_observing(made, quick_range(config.act_range, bits))
            self.rounded[bits] = made
        self._called = False
        self._samples = 0  # of this batch
        self._copies = 1
        self._products: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}

    @property
    def observes(self) -> bool:
        """Whether ranges come from a pass over the inputs."""
        return any(calibrated_act_quantizers(made) for made in self.rounded.values())

    def observe(self, layer: nn.Module, args: _Inputs) -> None:
        for made in self.rounded.values():
            made.quantized_input(args[0])

    def settle(self) -> None:
        """Set the ranges from what passed."""
        for made in self.rounded.values():
            settle_observed(made)

    def start(self, samples: int, copies: int = 1) -> None:
        """Begin a batch; products of all calls until `finish` add up.

        Args:
            samples: number of samples.
            copies: how often the network is given the samples in one call, one copy behind the other.
        """
        self._samples, self._copies, self._products = samples, copies, {}

    def on_input(self, layer: nn.Module, args: _Inputs) -> _Inputs | None:
        """Have the backward pass multiply the noise of this call's input by its gradient."""
        self._called = True
        x = args[0]
        if not torch.is_grad_enabled():  # a checkpointed part, which is called again in the backward pass
            return None
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()  # other users of x do not count
        values = until_backward(x)
        x.register_hook(lambda gradient: self._multiply(gradient, values()))
        return (x, *args[1:])

    def on_output(self, layer: nn.Module, args: _Inputs, out: Tensor) -> Tensor | None:
        """Likewise with the noise of this call's output, which is that of the weight times the input."""
        self._called = True
        if not torch.is_grad_enabled():
            return None
        out = out.view_as(out) if out.requires_grad else out.detach().requires_grad_()
        values = until_backward(args[0])
        out.register_hook(lambda gradient: self._multiply(gradient, values()))
        return out

    @torch.no_grad()
    def _noise_of(self, made: QuantModule, x: Tensor) -> Tensor:
        if self.operand is Operand.ACTIVATIONS:
            return made.quantized_input(x) - x
        part = made.quantized_part(x)
        noise = made.apply_weight(part, (made.dequantized_weight() - made.float_weight()).to(x.dtype), None)
        return noise if made.first_token is None else torch.cat([torch.zeros_like(noise[:, :1]), noise], dim=1)

    def _multiply(self, gradient: Tensor, x: Tensor) -> None:
        # Only now, so that no layer's noise waits for the backward pass.
        for bits, made in self.rounded.items():
            products = gradient * self._noise_of(made, x)
            # Where samples do not come first, all of them are in one projection.
            rows = products.flatten(1) if products.dim() > 1 else products[None]
            sums = rows.sum(1, dtype=torch.float64)
            made = by_sample(sums, self._samples, self._copies)
            self._products[bits] = made if bits not in self._products else self._products[bits] + made

    def finish(self, scale: float | Tensor = 1.0) -> None:
        """End a batch; its noise counts ``scale`` times."""
        for bits, products in self._products.items():
            self._squares[bits] = scale * products.square().sum() + self._squares.get(bits, 0.0)
        self._products = {}

    def quality(self, signal: float) -> dict[int, float] | None:
        """Return the SQNR by width; None if the layer was never called."""
        if not self._called:
            return None
        noises = {bits: float(self._squares.get(bits, 0.0)) for bits in self.rounded}
        return {bits: sqnr(signal, noise) for bits, noise in noises.items()}
