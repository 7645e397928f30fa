"""The sensitivity of a sampler's result to every layer's width at once, by the adjoint of its trajectory.

Images suffer from what the errors of all network calls add up to, which the error of ε at single calls does not tell:
an error of a weight is the same at every step and adds up, rounding noise of activations averages out, guidance
amplifies the difference of its two halves, and early and late steps count differently. Samplers are linear in ε
(`Sampler.response`): x_k = Σ_j C_kj·ε_j + …, with the result as the last row. So for a random v, the gradient of v·x_0
by ε_j is g_j = C_0j·v + Σ_k>j C_kj·J_kᵀ·g_k, with J_k the derivative of ε_k by x_k: one forward and one backward pass
of the network for each call, from the last to the first, in the memory of a single one. What `probed_sensitivity` does
at one call is summed over all of them before it is squared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from qdiff.calibration.probed_sensitivity import Found, RoundedLayer, parameters_without_gradients
from qdiff.calibration.sensitivity import Operand
from qdiff.calibration.weight_noise import ROWS, WeightNoise
from qdiff.config import QuantConfig
from qdiff.pipeline import Pipeline
from qdiff.ranges.first_token import FirstToken
from qdiff.sampling import Sampler
from qdiff.wrapping import layer_places

MOST_CALLS, FEWER_STEPS = 64, 25  # a trajectory of more calls is replaced by one of so many steps
# How much the relative noise of ε at the last call counts, beside that of the result. It hardly reaches the result, so
# that without a share it is over twice as large; with this one the result's noise is 5 to 30 % larger (estimates, on
# the bundled DDIM, VQ and KL models).
LAST_CALL = 0.03
TOGETHER, GRADIENT_BYTES = 16, 1 << 31  # trajectories at a time: each has a gradient of all weights


class _Call(NamedTuple):
    """What one network call of a batch takes, before guidance doubles it."""

    x: Tensor
    t: Tensor
    condition: Tensor | None
    unconditional: Tensor | None


def short_sampler(sampler: Sampler) -> Sampler:
    """Return the sampler, or one of fewer steps that it may be replaced with: its calls are costly, or it clips."""
    return sampler.with_steps(FEWER_STEPS) if sampler.clips or sampler.calls > MOST_CALLS else sampler


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
    those of the config's estimators over these trajectories, shared by all timesteps.

    Args:
        pipeline: its float network must be loaded, and not wrapped; it is unchanged afterwards.
        names: layers of `qdiff.wrapping.layer_places`, by operand.
        widths: in bits, by operand.
        config: how ranges are chosen, and what is split.
        images: numbers of images of the calibration stream; each has one projection.
        generator: of the projections, on the CPU.
        first_tokens: by layer (`qdiff.calibration.first_token`); these tokens are not quantized.
        on_batch: called with the number of images of each finished batch.

    Returns:
        10·log₁₀(Σ x_0² / Σ (v·noise)²), by operand, layer and width; None for a layer that is never called. The noise
        has a share of that of ε at the last call.
    """
    network, sampler = pipeline.network, short_sampler(pipeline.sampler)
    response, device = sampler.response(), next(pipeline.network.parameters()).device
    layers = _Layers(pipeline, names, widths, config, first_tokens, generator)
    size = max(1, min(TOGETHER, pipeline.batch_size, len(images), GRADIENT_BYTES // layers.gradient_bytes))
    batches = [images[i : i + size] for i in range(0, len(images), size)]
    trajectories, results = [], []
    with torch.no_grad(), layers.watching(-(-ROWS // (sampler.calls * len(batches)))):
        for rows in batches:
            calls: list[_Call] = []
            conditions = pipeline.conditions(rows, calibration=True)
            note = lambda *given, calls=calls: calls.append(_Call(given[0].clone(), *given[1:]))  # noqa: E731
            results.append(sampler(network, rows, device, *conditions, calibration=True, on_call=note))
            trajectories.append(calls)
    layers.settle()
    signal = float(sum(result.double().square().sum() for result in results))
    with parameters_without_gradients(network), torch.enable_grad(), layers.listening():
        for calls, result in zip(trajectories, results, strict=True):
            batch = len(result), 1 if calls[0].unconditional is None else 2
            layers.start(*batch)
            v = torch.randn(result.shape, generator=generator).to(result)
            _backward(pipeline, sampler, response, calls, v)
            layers.finish()
            layers.start(*batch)
            last = _predicted(pipeline, sampler, calls[-1])
            (last * torch.randn(last.shape, generator=generator).to(last)).sum().backward()
            # Relative to the signal of ε there, as that of the result is to its own.
            layers.finish(LAST_CALL * float(result.double().square().sum() / last.detach().double().square().sum()))
            on_batch(len(result))
    return layers.found(signal)


def _backward(pipeline: Pipeline, sampler: Sampler, response: Tensor, calls: Sequence[_Call], v: Tensor) -> None:
    """Run backward through a trajectory from v·x_0; hooks see the gradients of every call."""
    of_result, of_inputs = response[-1].tolist(), response[:-1].tolist()
    inputs: dict[int, Tensor] = {}  # gradients by x at later calls
    for k in reversed(range(len(calls))):
        gradient = of_result[k] * v
        for j, later in inputs.items():
            if of_inputs[j][k] != 0:
                gradient = gradient + of_inputs[j][k] * later
        predicted = _predicted(pipeline, sampler, calls[k])
        predicted.backward(gradient.to(predicted))
        inputs[k], calls[k].x.grad = calls[k].x.grad, None


def _predicted(pipeline: Pipeline, sampler: Sampler, call: _Call) -> Tensor:
    """Return ε of a call after guidance, with a graph back to its x."""
    predict = sampler.noise_prediction(pipeline.network, call.condition, call.unconditional)
    return predict(call.x.requires_grad_(), call.t)


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

    def finish(self, scale: float = 1.0) -> None:
        for layer in (*self.inputs.values(), *self.weights.values()):
            layer.finish(scale)

    def found(self, signal: float) -> dict[Operand, Found]:
        """Return the SQNR by operand, layer and width."""
        return {
            Operand.WEIGHTS: {name: layer.quality(signal) for name, layer in self.weights.items()},
            Operand.ACTIVATIONS: {name: layer.quality(signal) for name, layer in self.inputs.items()},
        }
