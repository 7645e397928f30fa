"""Record the calibration set that a plan asks for, and read what it takes from a recording."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from qdiff.calibration.collect import record_draw, record_evenly, recorded_calls
from qdiff.calibration.sample_timesteps import check_timesteps
from qdiff.calibration.samples import CalibrationSet, check_context, load_recording, select_pairs, select_samples
from qdiff.calibration.timesteps import Spacing, ends_early
from qdiff.cli.options.ptq import PtqPlan
from qdiff.cli.out_of_memory import memory_advice, smaller_batch
from qdiff.cli.run_folder import RunFolder
from qdiff.config import ActRanges
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

# First image of the calibration streams for --cali_seed 0, and the number of images per such seed.
SEEDED_FROM, SEEDED_IMAGES = 1 << 24, 1 << 20


def first_image(seed: int | None) -> int:
    """Return the number of the first image of the calibration streams that a ``--cali_seed`` records."""
    return 0 if seed is None else SEEDED_FROM + seed * SEEDED_IMAGES


def read_planned(
    plan: PtqPlan,
    path: Path,
    image_shape: tuple[int, ...],
    context_shape: tuple[int, ...] | None,
    training_steps: int | None,
    visited: Sequence[float],
) -> tuple[CalibrationSet, CalibrationSet | None]:
    """Return the samples that a plan takes from a recording, and the pairs of steps if it calibrates changes.

    Args:
        path: the recording.
        image_shape: (C, H, W) of the network's input.
        context_shape: (L, D) of a conditional network's context, else None.
        training_steps: T; a recording with a timestep of T or later is refused. None skips this check.
        visited: the timesteps that sampling calls the network at, in order; empty where they are unknown.

    Raises:
        UserError: the file is missing, damaged, or does not fit, or lacks timesteps that ranges per timestep need.
    """
    recording = load_recording(path, training_steps)
    # A draw's samples already are at the steps that its distribution chose, so all are used.
    steps, per_step = (plan.steps, plan.per_step) if plan.draw is None else (None, None)
    chosen = (recording, steps, per_step, image_shape, context_shape is not None, path, plan.spacing)
    data = select_samples(*chosen)
    check_context(data, context_shape, path)
    check_timesteps(plan.quant, data.inputs[1], visited)
    return data, None if plan.changes is None else select_pairs(*chosen)


def check_to_be_recorded(plan: PtqPlan, pipeline: Pipeline) -> None:
    """Raise a `UserError`, before any work, if a plan's recording cannot be made, or lacks timesteps that it needs."""
    if plan.draw is not None or not plan.records:  # which timesteps a draw gives is known only afterwards
        return
    calls = recorded_calls(pipeline, plan.steps, plan.changes is not None, plan.spacing)
    if plan.quant.act_ranges is ActRanges.TIMESTEP and (visited := pipeline.sampler.visited()):
        check_timesteps(plan.quant, torch.tensor(visited)[calls], visited)


def warn_if_ends_early(plan: PtqPlan, data: CalibrationSet, visited: Sequence[float]) -> None:
    """Warn of samples without those of the run's end, where a given file should have them or ranges are per timestep.

    Args:
        visited: see `read_planned`.
    """
    if not ends_early(data.inputs[1], visited):
        return
    ends = float(data.inputs[1].min()), min(visited)
    if plan.data is not None and plan.spacing is Spacing.ENDS:
        log.warning(
            "%s ends at timestep %g, but sampling goes on to %g, where activations may be larger: record it with "
            "--cali_spacing ends, or leave out --cali_data_path",
            *(plan.data, *ends),
        )
    elif plan.quant.act_ranges is ActRanges.TIMESTEP:
        log.warning(
            "samples end at timestep %g, and what sampling does down to %g takes the ranges of that timestep; "
            "--cali_spacing ends gives the last one its own",
            *ends,
        )


def record_planned(
    pipeline: Pipeline, plan: PtqPlan, run: RunFolder, seed: int, qnn: QuantModel | None = None
) -> dict[str, Tensor | list[Tensor]]:
    """Record a calibration set, and write to the run folder how a draw distributed its samples over the steps.

    Args:
        pipeline: its weights must be loaded.
        seed: seed of the calibration, which decides a draw.
        qnn: the pipeline's network, calibrated, whose quantized trajectory is recorded; None records the float one.
    """
    kind = "float" if qnn is None else "quantized"
    first = first_image(plan.seed)
    if plan.draw is None:
        log.info("recording %d samples at %d steps from the %s model", plan.per_step, plan.steps, kind)
        with memory_advice("recording", smaller_batch(pipeline.batch_size)):
            pairs = plan.changes is not None
            return record_evenly(pipeline, plan.steps, plan.per_step, first, pairs=pairs, qnn=qnn, spacing=plan.spacing)
    told = plan.draw.count, plan.draw.schedule.value, kind
    log.info("recording %d samples, one per image, by distribution %s, from the %s model", *told)
    fewer = max(1, plan.draw.batch_size // 2)
    with memory_advice("recording", f"start again with --batch_samples {fewer} in another --logdir"):
        recording, allocation, timesteps = record_draw(pipeline, plan.draw, seed, first, qnn)
    if allocation is not None:
        from qdiff.report.allocation_plot import allocation_picture  # loads matplotlib, which sampling does not need

        values = {f.name: getattr(allocation, f.name).tolist() for f in fields(allocation)}
        run.manifest.allocation = {"timesteps": timesteps, **values}
        allocation_picture(allocation, run.path / "allocation.png", timesteps)
        run.save_manifest()  # a killed calibration continues without recording again
    return recording
