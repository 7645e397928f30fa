"""Python API: record a calibration set, choose widths, calibrate, sample. Tour: docs/api.md; programs: examples/.

Here a sampler is any ``sampler(network, rows)`` that calls ``network(x, t)`` or ``network(x, t, context)`` and returns
the samples numbered ``rows``, [N, …]: the `sample` of a pipeline, or a function of your own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.first_token import set_first_tokens
from qdiff.calibration.input_scales import InputScaling
from qdiff.calibration.mixed_precision import TRAJECTORIES, MixedPrecision, check_reachable, layers_to_measure
from qdiff.calibration.mixed_precision import choose_widths as allocate_widths
from qdiff.calibration.refit import discard_calibration
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.scaling import set_input_scales
from qdiff.calibration.sensitivity import Operand
from qdiff.calibration.timesteps import Spacing, spaced
from qdiff.calibration.trajectory_sensitivity import trajectory_sensitivities
from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.errors import UserError, require_at_least
from qdiff.interface import family_of
from qdiff.io.progress import progress_bar
from qdiff.methods.registry import DEFAULT, Method, find_method
from qdiff.modes import check_is_float
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel
from qdiff.ranges.first_token import FirstToken
from qdiff.wrapping import check_layer_bits

Sampler = Callable[[Callable[..., Tensor], Sequence[int]], Tensor]


@torch.no_grad()
def record(
    sampler: Sampler, network: nn.Module, count: int, steps: int, batch_size: int = 64, spacing: Spacing = Spacing.EVERY
) -> CalibrationSet:
    """Sample from the float network and keep its inputs at chosen calls.

    Args:
        network: float network; a `QuantModel` computes in float outside of ``quantized()``, and inside of it its own
            trajectory is recorded, to calibrate it again (`qdiff.calibration.refit`).
        count: number of samples; with guidance that doubles the batch, each sample gives two inputs per step.
        steps: number of calls of a sampling run to keep.
        batch_size: samples per batch.
        spacing: which calls these are: Q-Diffusion's, or from the first to the last one.

    Returns:
        The inputs of the kept calls, on the CPU; count·steps rows.

    Raises:
        UserError: ``count`` or ``batch_size`` is below 1, or the sampler takes fewer steps than ``steps``.
    """
    if count < 1 or batch_size < 1:
        raise UserError(f"count is {count} and batch_size {batch_size}; give at least 1")
    kept: list[tuple[Tensor, ...]] = []
    for first in range(0, count, batch_size):
        calls: list[tuple[Tensor, ...]] = []

        def listening(*inputs: Tensor, calls: list = calls) -> Tensor:
            calls.append(tuple(i.detach().cpu() for i in inputs))
            return network(*inputs)

        sampler(listening, range(first, min(first + batch_size, count)))
        kept += [calls[i] for i in spaced(len(calls), steps, spacing)]
    return CalibrationSet(tuple(torch.cat(part) for part in zip(*kept, strict=True)))


def choose_widths(
    pipeline: Pipeline,
    config: QuantConfig,
    *,
    images: int = TRAJECTORIES,
    seed: int = 0,
    first_tokens: Mapping[str, FirstToken] = MappingProxyType({}),
    show_progress: bool = True,
) -> QuantConfig:
    """Return a config with widths of single layers, by what rounding each does to the sampler's result.

    The widths that are given become means: the size and the bit operations stay those of uniform widths. As GRIP
    chooses in the commands; any method can calibrate the result. Inputs keep theirs with dynamic ranges and modulation.

    Args:
        pipeline: its float network must be loaded, and not wrapped; it is unchanged afterwards.
        config: how ranges are chosen, and the means; layers of its ``layer_bits`` keep theirs.
        images: trajectories that are gone back through, of the pipeline's calibration stream.
        seed: of the projections.
        first_tokens: by layer, where the config is ``bos_aware`` (`qdiff.calibration.first_token`).

    Raises:
        UserError: an argument is wrong, no widths meet the means, or the pipeline's loop lets no gradients through; the
            last alone is found after sampling.
    """
    _check_can_choose(pipeline, config, images, first_tokens)
    mixed = MixedPrecision.around(config, images)
    macs = account(pipeline.network, pipeline.input_shape, pipeline.context_shape).macs_by_layer
    check_reachable(pipeline.network, config, mixed, macs)
    layers = {
        operand: layers_to_measure(pipeline.network, config, operand) if mixed.widths(operand) else {}
        for operand in Operand
    }
    paths, widths = ({o: list(found.values()) for o, found in layers.items()}, {o: mixed.widths(o) for o in Operand})
    generator = torch.Generator().manual_seed(seed)
    with progress_bar(images, "choosing widths", unit="img", disable=not show_progress) as bar:
        found = trajectory_sensitivities(
            pipeline, paths, widths, config, range(images), generator, first_tokens, on_batch=bar.update
        )
    named = {o: {name: found[o][path] for name, path in of_operand.items()} for o, of_operand in layers.items()}
    return allocate_widths(pipeline.network, config, mixed, named, macs).quant


def _check_can_choose(pipeline: Pipeline, config: QuantConfig, images: int, first_tokens: Mapping) -> None:
    require_at_least(1, {"images": images})
    if not isinstance(pipeline, Pipeline) or not hasattr(pipeline, "network"):
        raise UserError(
            f"widths are chosen on a pipeline of this project whose load() was called, not on this "
            f"{type(pipeline).__name__}; a pipeline of diffusers is quantized by qdiff.quantize_pipeline"
        )
    if config.weight_bits is None and not config.calibrates_acts:
        raise UserError(
            "the config has neither weight_bits nor act_bits with calibrated ranges; give at least one of these"
        )
    if config.bos_aware and not first_tokens:
        raise UserError("the config is bos_aware; give first_tokens, as qdiff.calibration.first_token finds them")
    if torch.is_inference_mode_enabled():
        raise UserError("widths are chosen by gradients, which torch.inference_mode forbids; call this outside of it")
    check_is_float(pipeline.network)
    family = family_of(pipeline.network)
    check_layer_bits(pipeline.network, config, family.ends, prefix=family.prefix)


def calibrate(
    qnn: QuantModel,
    data: CalibrationSet,
    method: str = DEFAULT,
    config: Any = None,
    *,
    seed: int = 0,
    run: CalibrationRun | None = None,
    scaling: InputScaling | None = None,
) -> dict[str, float]:
    """Set all quantizers of a network, in place; what an earlier calibration set is forgotten.

    Args:
        qnn: network with the desired widths and loaded float weights.
        data: calibration set, recorded from the float network or from the quantized one.
        method: a name of `qdiff.methods.registry.METHODS`.
        config: the method's settings, an instance of its config class; None takes the paper's values.
        seed: seed of the calibration.
        run: memory, journal, progress and seed; None keeps all activations in memory and shows a progress bar.
        scaling: how layers get factors of their input's channels before anything is quantized; None does as the method
            does (only DMQ scales).

    Returns:
        The final reconstruction error of every fitted unit, by its name.

    Raises:
        UserError: the method is unknown, or the config belongs to another method; or the first token of the contexts is
            not the same, where the network's config is ``bos_aware``.
    """
    row, config = method_and_config(method, config)
    run = run or CalibrationRun(seed)
    set_first_tokens(qnn, data.inputs)
    if run.weights:
        discard_calibration(qnn)  # of an earlier call, whose scales and biases this method may not set anew
        set_input_scales(qnn, data, row.scaling if scaling is None else scaling, run)
    row.calibrate(qnn, data, config, run)
    return run.errors


def method_and_config(method: str, config: Any = None) -> tuple[Method, Any]:
    """Return a method's row and its config; None takes the paper's values.

    Raises:
        UserError: the method is unknown, or the config belongs to another method.
    """
    row = find_method(method)
    if config is None and row.config is not None:
        config = row.config()
    if (row.config is None and config is not None) or (row.config is not None and not isinstance(config, row.config)):
        wanted = "nothing to set" if row.config is None else f"a {row.config.__name__}"
        raise UserError(f"the config of {method} is a {type(config).__name__}; the method takes {wanted}")
    return row, config


@torch.no_grad()
def sample(sampler: Sampler, qnn: QuantModel, rows: Sequence[int]) -> Tensor:
    """Return the samples numbered ``rows`` from the quantized network, [N, …], sampled in one trajectory."""
    with qnn.quantized(), qnn.trajectory():
        return sampler(qnn, rows)
