"""Carry out mixed precision inside a run folder: measure the layers, choose their widths, and keep both."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff.calibration.first_token import find_first_tokens
from qdiff.calibration.mixed_precision import MixedPrecision, check_reachable, choose_widths, layers_to_measure
from qdiff.calibration.probed_sensitivity import Found, probed_sensitivities
from qdiff.calibration.samples import CalibrationSet, save_recording
from qdiff.calibration.sensitivity import Measure, Operand, OutputQuality, layer_sensitivity
from qdiff.calibration.timesteps import Spacing, spaced
from qdiff.calibration.trajectory_sensitivity import trajectory_sensitivities
from qdiff.cli.options.layer_bits import read_layer_bits
from qdiff.cli.options.ptq import PtqPlan
from qdiff.cli.out_of_memory import memory_advice, smaller_batch
from qdiff.cli.planned_recording import first_image, read_planned, record_planned, warn_if_ends_early
from qdiff.cli.processes import arithmetic_of
from qdiff.cli.quantize import RECORDING
from qdiff.cli.run_folder import RunFolder
from qdiff.cli.run_manifest import OF_WIDTHS
from qdiff.cli.sensitivity_file import SensitivityFile
from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.evaluation.fidelity import mean_ssim
from qdiff.io.files import sha256, written_whole
from qdiff.io.images import to_uint8
from qdiff.io.progress import progress_bar
from qdiff.modes import check_is_float
from qdiff.pipeline import Pipeline
from qdiff.ranges.first_token import FirstToken

log = logging.getLogger("qdiff")

WIDTHS, SENSITIVITIES = "widths.json", "sensitivities.json"
PROBE_BATCH = 32  # samples per backward pass
SAMPLING = Measure.SSIM, Measure.TRAJECTORY  # these sample images, so that the sampler's settings decide what is found
# In a pipeline's config, what does not decide images of the calibration stream, or (weights) is a path of this machine.
_OF_THE_RUN = "num_images", "max_images", "weights"


def with_chosen_widths(
    plan: PtqPlan, pipeline: Pipeline, run: RunFolder, seed: int, start: str | None = None
) -> PtqPlan:
    """Return a plan whose config has the widths that its ``mixed`` asks for; without it, the plan.

    The calibration set is recorded first if there is none.

    Args:
        pipeline: its float network must be loaded, and not wrapped.
        run: widths and sensitivities that are there already are read.
        seed: seed of the calibration.
        start: ``--sensitivities``, a file of another run.

    Raises:
        UserError: a target cannot be reached, or a file is damaged, does not fit or has other settings.
    """
    if plan.mixed is None:
        return plan
    path = run.path / WIDTHS
    if not path.is_file():
        check_is_float(pipeline.network)
        macs = account(pipeline.network, pipeline.input_shape, pipeline.context_shape).macs_by_layer
        check_reachable(pipeline.network, plan.quant, plan.mixed, macs)
        data_file = Path(plan.data) if plan.data is not None else run.path / RECORDING
        visited = pipeline.sampler.visited()
        fitting = pipeline.input_shape, pipeline.context_shape, pipeline.training_steps, visited
        data = read_planned(plan, data_file, *fitting)[0] if data_file.is_file() or plan.data is not None else None
        file = SensitivityFile(run.path / SENSITIVITIES, _settings(plan, pipeline, seed), start and Path(start))
        run.open()
        with run.logged():
            if data is None:
                with run.timed("recording"):
                    save_recording(record_planned(pipeline, plan, run, seed), data_file)
                data = read_planned(plan, data_file, *fitting)[0]
            warn_if_ends_early(plan, data, visited)
            file.settle(sha256(data_file))
            advice = smaller_batch(pipeline.batch_size)
            with run.timed(OF_WIDTHS), memory_advice("measuring sensitivities", advice):
                _measure(plan, pipeline, data, file, seed)
                _choose(plan, pipeline, file, path, macs)
    layer_bits = {**dict(plan.quant.layer_bits), **read_layer_bits(str(path))}
    return replace(plan, quant=replace(plan.quant, layer_bits=layer_bits))


def _settings(plan: PtqPlan, pipeline: Pipeline, seed: int) -> dict[str, Any]:
    """Return what the sensitivities depend on, apart from the calibration set.

    Args:
        seed: of the calibration, which decides the projections of trajectories.
    """
    quant, mixed = plan.quant.to_dict(), plan.mixed
    quant.pop("layer_bits", None)  # decides which layers are measured, not what is found
    stream = {}
    if mixed.measure in SAMPLING:
        sampled = {name: value for name, value in pipeline.config.items() if name not in _OF_THE_RUN}
        stream = {"first": first_image(plan.seed), "noise": pipeline.sampler.seed, "sampled": sampled}
    if mixed.measure is Measure.TRAJECTORY:
        stream["seed"] = seed
    return {
        "weights": None if pipeline.weights is None else sha256(pipeline.weights),
        "measure": mixed.measure.value,
        **stream,
        "samples": mixed.samples,
        "widths": {operand.value: list(mixed.widths(operand)) for operand in Operand},
        "quant": quant,
        **arithmetic_of(pipeline.device),
    }


def _measure(plan: PtqPlan, pipeline: Pipeline, data: CalibrationSet, file: SensitivityFile, seed: int) -> None:
    """Measure the layers that are not in the file yet."""
    mixed = plan.mixed
    left = [
        (operand, name, path)
        for operand in Operand
        if mixed.widths(operand)
        for name, path in layers_to_measure(pipeline.network, plan.quant, operand).items()
        if (operand, name) not in file
    ]
    if not left:
        return
    log.info("measuring how sensitive the network is to %d operands of layers", len(left))
    tokens = find_first_tokens(pipeline.network, data.inputs) if plan.quant.bos_aware else {}
    if mixed.measure in (Measure.PROBE, Measure.TRAJECTORY):
        names = {path: name for _, name, path in left}
        paths = {operand: [path for kind, _, path in left if kind is operand] for operand in Operand}
        given = paths, {operand: mixed.widths(operand) for operand in Operand}, plan.quant
        if mixed.measure is Measure.PROBE:
            found = _probed(pipeline, given, spread_samples(data, mixed.samples), tokens)
        else:
            found = _by_trajectories(pipeline, given, first_image(plan.seed), mixed.samples, seed, tokens)
        for operand, values in found.items():
            file.add(operand, {names[path]: value for path, value in values.items()})
        return
    quality = (
        _image_quality(pipeline, first_image(plan.seed), mixed.samples)
        if mixed.measure is Measure.SSIM
        else _output_quality(pipeline, data, mixed)
    )
    with progress_bar(total=len(left), desc="sensitivities", unit="layer") as bar:
        for operand, name, path in left:
            widths = mixed.widths(operand)
            measured = (pipeline.network, path, plan.quant, operand, widths, quality, tokens.get(path))
            file.add(operand, {name: layer_sensitivity(*measured)})
            bar.update()


_Given = tuple[dict[Operand, list[str]], dict[Operand, tuple[int, ...]], QuantConfig]


def _probed(
    pipeline: Pipeline, given: _Given, inputs: Sequence[Tensor], tokens: Mapping[str, FirstToken]
) -> dict[Operand, Found]:
    """Measure all layers at once on calibration samples; projections are the same in every run."""
    size, generator = min(PROBE_BATCH, pipeline.batch_size), torch.Generator().manual_seed(0)
    return probed_sensitivities(pipeline.network, *given, inputs, size, generator, tokens)


def _by_trajectories(
    pipeline: Pipeline, given: _Given, first: int, count: int, seed: int, tokens: Mapping[str, FirstToken]
) -> dict[Operand, Found]:
    """Measure all layers at once along the trajectories of the calibration stream's images."""
    generator = torch.Generator().manual_seed(seed)
    with progress_bar(total=count, desc="sensitivities", unit="img") as bar:
        return trajectory_sensitivities(
            pipeline, *given, range(first, first + count), generator, tokens, on_batch=bar.update
        )


def _choose(plan: PtqPlan, pipeline: Pipeline, file: SensitivityFile, path: Path, macs: Mapping[str, int]) -> None:
    """Choose the widths and write them."""
    found = {operand: file.of(operand) for operand in Operand}
    chosen = choose_widths(pipeline.network, plan.quant, plan.mixed, found, macs)
    words = {
        "mean_bits": chosen.mean_bits,
        "mean_act_bits": chosen.mean_act_bits,
        "layer_bits": chosen.quant.to_dict()["layer_bits"],
    }
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(words, indent=1) + "\n")
    for what, mean, field in (
        ("weights", chosen.mean_bits, "weight_bits"),
        ("inputs of layers", chosen.mean_act_bits, "act_bits"),
    ):
        if mean is not None:
            counts = Counter(getattr(bits, field) for _, bits in chosen.quant.layer_bits)
            told = ", ".join(
                f"{count} of {bits}" for bits, count in sorted(counts.items(), key=str) if bits is not None
            )
            log.info("mean width of %s: %.4f bits (layers: %s)", what, mean, told)


def _output_quality(pipeline: Pipeline, data: CalibrationSet, mixed: MixedPrecision) -> OutputQuality:
    """SQNR of ε on samples of the calibration set."""
    return OutputQuality(pipeline.network, spread_samples(data, mixed.samples), pipeline.batch_size)


def spread_samples(data: CalibrationSet, count: int) -> list[Tensor]:
    """Return some inputs of a calibration set, each [count, …], or all if it has fewer; they are spread over all of it.

    Samples are stored by timestep, and every ⌊N/count⌋-th would leave out those of the last steps wherever the count
    does not divide N: then they are spread from the first sample to the last.
    """
    count = min(count, len(data))
    chosen = spaced(len(data), count, Spacing.ENDS if len(data) % count else Spacing.EVERY)
    return [part[chosen] for part in data.inputs]


def _image_quality(pipeline: Pipeline, first: int, count: int) -> Callable[[], float]:
    """Mean SSIM of images of the calibration stream, against those of the float network.

    Args:
        first: number of the first image, as in the recording.
        count: how many.
    """
    rows = range(first, first + count)

    @torch.no_grad()
    def images() -> Tensor:
        made = []
        for start in range(0, count, pipeline.batch_size):
            x_0 = pipeline.sample(pipeline.network, rows[start : start + pipeline.batch_size], calibration=True)
            made.append(torch.from_numpy(to_uint8(pipeline.to_images(x_0))).permute(0, 3, 1, 2))
        return torch.cat(made)

    in_float = images()
    return lambda: mean_ssim(images(), in_float)
