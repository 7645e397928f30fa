"""Record the calibration set that a plan asks for."""

from __future__ import annotations

import logging
from dataclasses import fields

from torch import Tensor

from qdiff.calibration.collect import record_draw, record_evenly
from qdiff.cli.options.ptq import PtqPlan
from qdiff.cli.out_of_memory import memory_advice, smaller_batch
from qdiff.cli.run_folder import RunFolder
from qdiff.pipeline import Pipeline

log = logging.getLogger("qdiff")

# Images of the calibration streams that belong to --cali_seed 0, and how many each such seed has.
SEEDED_FROM, SEEDED_IMAGES = 1 << 24, 1 << 20


def record_planned(pipeline: Pipeline, plan: PtqPlan, run: RunFolder, seed: int) -> dict[str, Tensor | list[Tensor]]:
    """Record a calibration set, and keep in the run folder how a draw's samples fell on the steps.

    Args:
        pipeline: loaded.
        seed: of the calibration, which decides a draw.
    """
    # Another --cali_seed sees other images.
    first = 0 if plan.seed is None else SEEDED_FROM + plan.seed * SEEDED_IMAGES
    if plan.draw is None:
        log.info("recording %d samples at %d steps from the float model", plan.per_step, plan.steps)
        with memory_advice("recording", smaller_batch(pipeline.batch_size)):
            return record_evenly(pipeline, plan.steps, plan.per_step, first=first, pairs=plan.changes is not None)
    log.info("recording %d samples, one per image, by schedule %s", plan.draw.count, plan.draw.schedule.value)
    fewer = max(1, plan.draw.batch_size // 2)
    with memory_advice("recording", f"begin anew with --batch_samples {fewer} in another --logdir"):
        recording, allocation, timesteps = record_draw(pipeline, plan.draw, seed, first)
    if allocation is not None:
        from qdiff.report.allocation_plot import allocation_picture  # matplotlib, which sampling does not need

        values = {f.name: getattr(allocation, f.name).tolist() for f in fields(allocation)}
        run.manifest.allocation = {"timesteps": timesteps, **values}
        allocation_picture(allocation, run.path / "allocation.png", timesteps)
        run.save_manifest()  # whoever continues a killed calibration does not record again
    return recording
