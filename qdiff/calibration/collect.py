"""Calibration sets from a pipeline's sampling: at evenly spaced steps, in pairs, or drawn by a distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qdiff.calibration.recording import Sample, assign, record_assigned, record_calls, record_features
from qdiff.calibration.tdac import Allocation, tdac
from qdiff.calibration.timesteps import Draw, Schedule, Spacing, normal_counts, spaced, uniform_counts
from qdiff.errors import UserError
from qdiff.interface import SteppedNetwork, family_of
from qdiff.io.progress import progress_bar
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel
from qdiff.sampling import OnCall

# TDAC compares the features of one batch; more images than this give the same result and only fill memory.
LOOKED_AT = 64


def recorded_calls(pipeline: Pipeline, steps: int, pairs: bool = False, spacing: Spacing = Spacing.EVERY) -> list[int]:
    """Return which calls of a sampling run `record_evenly` keeps, counted from 0 (the noisiest).

    Args:
        pairs: also keep the call before each.

    Raises:
        UserError: the sampler makes fewer calls.
    """
    if not pairs:
        return spaced(pipeline.calls, steps, spacing)
    if pipeline.calls < 2:
        raise UserError("pairs of steps cannot be recorded from a sampler with one step; give it more steps")
    if steps >= pipeline.calls:  # no call precedes the first
        raise UserError(
            f"--cali_st {steps} with each previous step needs more than the {pipeline.calls} steps of this sampler; "
            f"give --cali_st {pipeline.calls - 1} or less"
        )
    return [call + 1 for call in spaced(pipeline.calls - 1, steps, spacing)]


def _sampler(pipeline: Pipeline, first: int, qnn: QuantModel | None = None) -> Sample:
    """Return what samples the images of the calibration streams from number ``first`` on.

    Args:
        qnn: samples quantized, every batch in a trajectory of its own; None has the float network sample.
    """

    def sample(on_call: OnCall, rows: Sequence[int]) -> Tensor:
        numbers = [first + i for i in rows]
        if qnn is None:
            return pipeline.sample(pipeline.network, numbers, calibration=True, on_call=on_call)
        with qnn.quantized(), qnn.trajectory():
            return pipeline.sample(qnn, numbers, calibration=True, on_call=on_call)

    return sample


@torch.no_grad()
def record_evenly(
    pipeline: Pipeline,
    steps: int,
    per_step: int,
    first: int = 0,
    show_progress: bool = True,
    pairs: bool = False,
    qnn: QuantModel | None = None,
    and_last: bool = False,
    spacing: Spacing = Spacing.EVERY,
) -> dict[str, Tensor]:
    """Record the network's inputs at chosen calls, from image ``first`` of the calibration streams.

    Args:
        pipeline: its weights must be loaded.
        steps: how many calls to record.
        per_step: how many images to record per call.
        pairs: also record ``xs_prev`` and ``ts_prev``, the call before each.
        qnn: the pipeline's network, wrapped and calibrated, which then samples quantized; None records from the float
            network.
        and_last: also record the sampler's last call, behind the others if it is not one of them.
        spacing: which calls these are.

    Returns:
        The published format: see `record_calls`.
    """
    calls = recorded_calls(pipeline, steps, pairs, spacing)
    if and_last:
        calls = [*dict.fromkeys((*calls, pipeline.calls - 1))]
    kept = sorted({*calls, *(call - 1 for call in calls)}) if pairs else calls
    with progress_bar(total=per_step, desc="recording", unit="img", disable=not show_progress) as bar:
        sample = _sampler(pipeline, first, qnn)
        recorded = record_calls(sample, per_step, pipeline.batch_size, kept, on_batch=bar.update)
    if not pairs:
        return recorded
    here, before = ([kept.index(call + shift) for call in calls] for shift in (0, -1))
    return {key: values[here] for key, values in recorded.items()} | {
        f"{key}_prev": recorded[key][before] for key in ("xs", "ts")
    }


def check_draw(network: SteppedNetwork, draw: Draw) -> None:
    """Raise a `UserError`, before any work, if `record_draw` cannot distribute the samples of this network."""
    if draw.schedule is Schedule.TDAC and family_of(network).middle is None:
        raise UserError(f"TDAC knows no middle of {type(network).__name__}; give another --calib_im_mode")


@torch.no_grad()
def record_draw(
    pipeline: Pipeline, draw: Draw, seed: int, first: int = 0, qnn: QuantModel | None = None
) -> tuple[dict[str, list[Tensor]], Allocation | None, list[float]]:
    """Record one network input per image, at the step that the draw's distribution assigns to it.

    Args:
        pipeline: its weights must be loaded.
        seed: decides at which step each image gives its sample.
        first: first image of the calibration streams to use.
        qnn: as in `record_evenly`. The distribution stays that of the float network, so that both networks' recordings
            have the same images at the same steps.

    Returns:
        The recording (see `record_assigned`); TDAC's allocation, or None for other distributions; and the timesteps of
        the sampler's calls.
    """
    generator = torch.Generator().manual_seed(seed)
    timesteps: list[float] = []

    own_sample = _sampler(pipeline, first, qnn)

    def sample(on_call: OnCall, rows: Sequence[int]) -> object:
        def listen(x: Tensor, t: Tensor, *conditions: Tensor | None) -> None:
            timesteps.append(float(t[0]))
            on_call(x, t, *conditions)

        timesteps.clear()
        return own_sample(listen, rows)

    check_draw(pipeline.network, draw)
    allocation = None
    if draw.schedule is Schedule.TDAC:
        middle = family_of(pipeline.network).middle
        looked_at = range(min(draw.batch_size, draw.count, LOOKED_AT))
        features = record_features(_sampler(pipeline, first), pipeline.network, middle, looked_at)
        allocation = tdac(features, draw.radius, draw.lamda, draw.count)
        counts = allocation.counts
    elif draw.schedule is Schedule.NORMAL:
        counts = normal_counts(pipeline.calls, draw.count, generator)
    else:
        counts = uniform_counts(pipeline.calls, draw.count)
    with progress_bar(total=draw.count, desc="recording", unit="img") as bar:
        recording = record_assigned(sample, assign(counts, generator), draw.batch_size, on_batch=bar.update)
    return recording, allocation, list(timesteps)
