"""Error of ε at each sampling step: with modulation, without parts of it, and without it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qdiff.calibration.collect import record_evenly
from qdiff.calibration.samples import network_calls
from qdiff.checkpoint import load_checkpoint
from qdiff.cli.options.ptq import PtqPlan, resolve_ptq
from qdiff.cli.processes import choose_device
from qdiff.config import Ablation, QuantConfig
from qdiff.errors import UserError, require_at_least
from qdiff.evaluation.noise_error import measure_trajectory_error
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel

VARIANTS: dict[str, Callable[[QuantConfig], QuantConfig]] = {
    "not modulated": lambda quant: replace(quant, modulate=False, ablation=None),
    "modulated, errors add up": lambda quant: replace(quant, modulate=True, ablation=Ablation.NO_COMPENSATION),
    "modulated": lambda quant: replace(quant, modulate=True, ablation=None),
    "state cleared at every step": lambda quant: replace(quant, modulate=True, ablation=Ablation.CLEARED_STATE),
}


def resolve(args: Namespace, pipeline: Pipeline) -> PtqPlan:
    """Return the plan of a command's options, after checking that it fits this comparison.

    Raises:
        UserError: no checkpoint with finished weights is given, or the ranges are not dynamic.
    """
    plan = resolve_ptq(args, pipeline.weight_range, pipeline.act_range)
    if plan is None or not plan.quant.act_dynamic:
        raise UserError(
            "this compares dynamic ranges with and without modulation; give --ptq --quant_act --quant_mode dynamic"
        )
    if plan.action != "load":
        raise UserError("this needs finished weights; give --cali_ckpt PATH")
    require_at_least(1, {"--images": args.images})
    return plan


def step_errors(pipeline: Pipeline, plan: PtqPlan, images: int, device: str | None) -> dict[str, Any]:
    """Run every variant along the same trajectories of the float model.

    Args:
        images: number of trajectories, from the calibration streams.

    Returns:
        ``timesteps`` of the sampler's calls; ``errors``, per variant the mean squared difference of ε from float at
        each call; ``fired``, per variant the share of (activation quantizer, call) pairs in which it quantized;
        ``images``.
    """
    pipeline.load(choose_device(device))
    recording = record_evenly(pipeline, pipeline.calls, images, show_progress=False)
    calls = network_calls(recording)
    found: dict[str, Any] = {
        "timesteps": [float(t[0]) for t in recording["ts"]],
        "errors": {},
        "fired": {},
        "images": images,
    }
    for name, change in VARIANTS.items():
        pipeline.load(pipeline.device)  # wrapping replaces the network's layers
        qnn = QuantModel(pipeline.network, change(plan.quant))
        load_checkpoint(qnn, plan.checkpoint)
        found["errors"][name] = measure_trajectory_error(qnn, calls, range(len(calls)), precision=pipeline.precision)[
            "by_call"
        ]
        counts = [quantizer.fired for quantizer in qnn.act_quantizers().values()]
        found["fired"][name] = sum(counts) / (len(counts) * len(calls))
    return found
