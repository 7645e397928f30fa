"""The sensitivity of a sampler's result to every layer's width at once, by going backward through its trajectory.

Images suffer from what the errors of all network calls add up to, which the error of ε at single calls does not tell:
an error of a weight is the same at every step and adds up, rounding noise of activations averages out, guidance
amplifies the difference of its two halves, and early and late steps count differently. So the result x_0 of a whole run
of the sampler is projected on a random v, and the gradient of v·x_0 goes backward through the sampler's own arithmetic
and, from the last call to the first, through the network: every call keeps nothing but its input and is made again
(`_Call`), so that the memory is that of one call. What `probed_sensitivity` does at one call is summed over all of them
before it is squared. Any loop will do whose arithmetic torch can differentiate, those of diffusers pipelines too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.probed_sensitivity import Found, RoundedLayer, parameters_without_gradients, projection_of
from qdiff.calibration.sensitivity import Operand
from qdiff.calibration.weight_noise import ROWS, WeightNoise
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.pipeline import Pipeline
from qdiff.ranges.first_token import FirstToken
from qdiff.wrapping import layer_places

MOST_CALLS, FEWER_STEPS = 64, 25  # a trajectory of more calls is replaced by one of so many steps
# How much the relative noise of ε at the last call counts, beside that of the result. It hardly reaches the result, so
# that without a share it is over twice as large; with this one the result's noise is 5 to 30 % larger (estimates, on
# the bundled DDIM, VQ and KL models).
LAST_CALL = 0.03
TOGETHER, GRADIENT_BYTES = 16, 1 << 31  # trajectories at a time: each has a gradient of all weights


class _Call(torch.autograd.Function):
    """A network call that keeps its input alone; the backward pass makes it again, with the hooks of that time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, kept: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.x, ctx.call = kept, call
        return call(kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        return _backward(ctx.call, ctx.x, gradient), None, None, None


def _backward(call: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor | None:
    """Make a call again and run backward through it; return the gradient by its input, if it has one."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        out = call(x)
    out.backward(gradient.to(out))
    return x.grad


class _Watched:
    """A network in the place of a pipeline's own, whose calls can be gone back through.

    Attributes:
        last: the last call: its input, the function of it, and its output.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.anchor = network, torch.zeros((), requires_grad=True)
        self.last: tuple[Tensor, Callable[[Tensor], Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, *rest: Tensor) -> Tensor:
        torch.set_grad_enabled(True)  # loops are run without gradients; from here to their end they have them
        network = self.network.as_called() if hasattr(self.network, "as_called") else self.network

        def call(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return network(x, *rest)

        # Conditions are constants: what a ControlNet makes of x has a graph of its own, which is not gone back through.
        rest = tuple(part.detach() for part in rest)
        kept = x.detach().clone()  # samplers reuse their memory
        # The anchor gives the first call, whose input has no gradient, a backward pass too.
        out = _Call.apply(x, self.anchor, kept, call)
        self.last = kept, call, out.detach().clone()
        return out


def trajectory_sensitivities(
    pipeline: Pipeline,
    names: Mapping[Operand, Sequence[str]],
    widths: Mapping[Operand, Sequence[int]],
    config: QuantConfig,
    images: range,
    generator: torch.Generator,
    first_tokens: Mapping[str, FirstToken] = MappingProxyType({}),
    on_batch: Callable[[int], None] = lambda count: None,
) -> dict[Operand, Found]:
    """Estimate the SQNR of the sampler's result by the width of one operand of one layer, for all layers together.

    Weights are thought of as rounded column by column (`qdiff.calibration.weight_noise`). Ranges of activations are
    observed over these trajectories and shared by all timesteps; they are chosen as in `probed_sensitivities`.

    Args:
        pipeline: its float network must be loaded, and not wrapped; it is unchanged afterwards. A run of more than
            ``MOST_CALLS`` calls is replaced by one of fewer steps.
        names: layers of `qdiff.wrapping.layer_places`, by operand.
        widths: in bits, by operand.
        config: how ranges are chosen, and what is split.
        images: numbers of images of the calibration stream; each has one projection.
        generator: of the projections, on the CPU.
        first_tokens: by layer (`qdiff.calibration.first_token`); these tokens are not quantized.
        on_batch: called with the number of images of each finished batch.

    Returns:
        10·log₁₀(Σ x_0² / Σ (v·noise)²), by operand, layer and width; None for a layer that is never called. The noise
        has a share of that of ε at the last call, before guidance.

    Raises:
        UserError: the pipeline's loop lets no gradients through.
    """
    network = pipeline.network
    if pipeline.calls > MOST_CALLS:
        pipeline = pipeline.with_steps(FEWER_STEPS)
    layers = _Layers(pipeline, names, widths, config, first_tokens, generator)
    size = max(1, min(TOGETHER, pipeline.batch_size, len(images), GRADIENT_BYTES // layers.gradient_bytes))
    batches = [images[i : i + size] for i in range(0, len(images), size)]
    watched, results = [_Watched(network) for _ in batches], []
    with layers.watching(-(-ROWS // (pipeline.calls * len(batches)))):
        for run, rows in zip(watched, batches, strict=True):
            results.append(_result(pipeline, run, rows))
    layers.settle()
    # Sums stay on the device until the end: read batch by batch, the host would wait for a GPU each time.
    signal = sum(result.detach().double().square().sum() for result in results)
    with parameters_without_gradients(network), layers.listening():
        for run, rows in zip(watched, batches, strict=True):
            result, (x, call, last) = results.pop(0), run.last
            batch = len(rows), max(1, len(x) // len(rows))
            layers.start(*batch)
            result.backward(projection_of(result, generator))
            layers.finish()
            layers.start(*batch)
            _backward(call, x, projection_of(last, generator))
            # Relative to the signal of ε there, as that of the result is to its own.
            energy = last.double().square().sum()
            share = LAST_CALL * result.detach().double().square().sum() / energy
            layers.finish(torch.where(energy > 0, share, 0.0))
            on_batch(len(rows))
    return layers.found(float(signal))


def _result(pipeline: Pipeline, network: _Watched, rows: Sequence[int]) -> Tensor:
    """Return what the sampler ends with, with a graph back through all calls."""
    before = torch.is_grad_enabled()
    try:
        result = pipeline.sample_latents(network, rows)
    finally:
        torch.set_grad_enabled(before)
    if not result.requires_grad:
        raise UserError(
            f"the sampler of {pipeline.name} lets no gradients through, so widths cannot be chosen by its result; give "
            "--uniform_widths (in Python uniform_widths=True), or --sensitivity probe with targets"
        )
    return result


class _Layers:
    """All layers whose noise is estimated."""

    def __init__(
        self,
        pipeline: Pipeline,
        names: Mapping[Operand, Sequence[str]],
        widths: Mapping[Operand, Sequence[int]],
        config: QuantConfig,
        first_tokens: Mapping[str, FirstToken],
        generator: torch.Generator,
    ) -> None:
        places = layer_places(pipeline.network)
        modules = {name: parent._modules[attribute] for name, ((parent, attribute), *_) in places.items()}
        self.weights = {
            n: WeightNoise(modules[n], n, config, widths[Operand.WEIGHTS], first_tokens.get(n), generator)
            for n in names[Operand.WEIGHTS]
        }
        self.inputs = {
            n: RoundedLayer(
                modules[n], n, config, Operand.ACTIVATIONS, widths[Operand.ACTIVATIONS], first_tokens.get(n)
            )
            for n in names[Operand.ACTIVATIONS]
        }

    @property
    def gradient_bytes(self) -> int:
        """Bytes of one trajectory's gradients."""
        weights = (layer.layer.weight for layer in self.weights.values())
        return max(1, sum(weight.numel() * max(weight.element_size(), 4) for weight in weights))

    @contextlib.contextmanager
    def watching(self, rows: int) -> Iterator[None]:
        """Have ranges of inputs observed, and so many rows kept of every call, inside the block."""
        with contextlib.ExitStack() as stack:
            for layer in self.inputs.values():
                stack.callback(layer.layer.register_forward_pre_hook(layer.observe).remove)
            for layer in self.weights.values():
                watch = lambda _, args, layer=layer: layer.keep(args[0], rows)  # noqa: E731
                stack.callback(layer.layer.register_forward_pre_hook(watch).remove)
            yield

    def settle(self) -> None:
        for layer in self.inputs.values():
            layer.settle()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for layer in self.inputs.values():
                stack.callback(layer.layer.register_forward_pre_hook(layer.on_input).remove)
            for layer in self.weights.values():
                stack.callback(layer.layer.register_forward_hook(layer.on_output).remove)
            yield

    def start(self, samples: int, copies: int) -> None:
        for layer in (*self.inputs.values(), *self.weights.values()):
            layer.start(samples, copies)

    def finish(self, scale: float | Tensor = 1.0) -> None:
        for layer in (*self.inputs.values(), *self.weights.values()):
            layer.finish(scale)

    def found(self, signal: float) -> dict[Operand, Found]:
        """Return the SQNR by operand, layer and width."""
        return {
            Operand.WEIGHTS: {name: layer.quality(signal) for name, layer in self.weights.items()},
            Operand.ACTIVATIONS: {name: layer.quality(signal) for name, layer in self.inputs.items()},
        }
