"""Error of a quantized network's ε against float on held-out inputs."""

from __future__ import annotations

import math
from typing import Any

from qdiff.calibration.collect import record_evenly
from qdiff.calibration.samples import network_calls, select_samples
from qdiff.calibration.timesteps import spaced
from qdiff.cli.out_of_memory import memory_advice, smaller_batch
from qdiff.errors import UserError
from qdiff.evaluation.noise_error import measure_noise_error, measure_trajectory_error
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel

# The number of held-out images, and of steps.
IMAGES, STEPS = 16, 10
# Largest batch size of these measurements.
BATCH = 64
# First held-out image: beyond every calibration set, and the same for all runs, so that errors can be compared.
FIRST = 1 << 20


def held_out_error(pipeline: Pipeline, qnn: QuantModel, half_precision: bool) -> dict[str, Any]:
    """Return the error of ε as run.json stores it.

    Args:
        pipeline: its weights must be loaded, its network wrapped by ``qnn``; the float weights are released here.
        half_precision: the run samples in half precision, which may overflow.

    Raises:
        UserError: the error is not finite, so every image would be black; or memory runs out.
    """
    with memory_advice("measuring the error of ε", smaller_batch(min(pipeline.batch_size, BATCH))):
        found = _measured(pipeline, qnn)
    wrong = next((found[name] for name in ("mse", "last_step") if not math.isfinite(found[name])), None)
    if wrong is not None:
        advice = "check the weights for layers whose values leave the range of float32"
        if half_precision:
            advice = "half precision overflows; give --precision full"
        raise UserError(f"the ε of the quantized network is {wrong}, and images of it would be black; {advice}")
    return found


def _measured(pipeline: Pipeline, qnn: QuantModel) -> dict[str, Any]:
    steps = min(STEPS, pipeline.calls)
    # Modulation carries state from step to step, so all steps of a trajectory are needed.
    recorded = pipeline.calls if qnn.config.modulate else steps
    # The last step is told apart: what noise is left in x_t is then finer than an 8-bit range.
    recording = record_evenly(pipeline, recorded, IMAGES, first=FIRST, show_progress=False, and_last=True)
    if qnn.config.modulate:
        compared = spaced(pipeline.calls, steps)
        calls = network_calls(recording)
        return measure_trajectory_error(qnn, calls, compared, release=True, precision=pipeline.precision)
    held_out, last_call = (
        select_samples(
            {key: values[part] for key, values in recording.items()},
            None,
            IMAGES,
            pipeline.input_shape,
            pipeline.conditional,
        )
        for part in (slice(steps), slice(-1, None))
    )
    batch_size = min(BATCH, pipeline.batch_size)
    return measure_noise_error(
        qnn, held_out, batch_size, release=True, precision=pipeline.precision, last_call=last_call
    )
