"""Carry out a quantization plan: load or calibrate, inside a run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.samples import CalibrationSet, load_recording, save_recording, select_samples
from qdiff.calibration.storage import ActivationStorage
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.cli.ptq import PtqPlan
from qdiff.cli.run_folder import RunFolder
from qdiff.files import sha256
from qdiff.interface import SteppedNetwork
from qdiff.methods import linear, qdiffusion
from qdiff.methods.common import CalibrationRun
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

CHECKPOINT = "quantized.safetensors"
RECORDING = "calibration_data.pt"
JOURNAL = "calibration"


def quantize(
    network: SteppedNetwork,
    plan: PtqPlan,
    run: RunFolder,
    seed: int,
    image_shape: tuple[int, ...],
    record: Callable[[int, int], dict[str, Tensor]],
    show_progress: bool = True,
) -> QuantModel:
    """Return the quantized network that a run samples from.

    Args:
        network: float weights loaded, on its device.
        plan: what to do.
        run: where the calibrated checkpoint, its recording and unfinished work are kept.
        seed: fixes the calibration.
        image_shape: (C, H, W) of the network's input.
        record: ``record(steps, per_step)`` samples from the float network and returns a recording.
    """
    finished = run.path / CHECKPOINT
    if plan.action == "load" or finished.is_file():
        source = plan.checkpoint if plan.action == "load" else finished
        qnn = QuantModel(network, plan.quant)
        load_checkpoint(qnn, source)
        run.add_file("quantized checkpoint", source)
        log.info("loaded %s", source)
        return qnn

    # Outside of `quantized` the wrapped network still computes in float, so recording comes after all checks.
    qnn = QuantModel(network, plan.quant)
    weights_loaded = None
    if plan.action == "activations":
        load_checkpoint(qnn, plan.checkpoint, activations=False)
        run.add_file("quantized checkpoint", plan.checkpoint)
        weights_loaded = sha256(plan.checkpoint)
    data = _calibration_data(plan, run, image_shape, record)
    journal = CalibrationJournal(
        run.path / JOURNAL,
        {"plan": {**plan.to_dict(), "memory_budget": None}, "seed": seed, "weights": weights_loaded},
    )
    budget = None if plan.memory_budget is None else int(plan.memory_budget * 2**30)
    calibration = CalibrationRun(seed, ActivationStorage(budget), journal, show_progress)
    log.info("calibrating with %s on %d samples", plan.method, len(data))
    with run.timed("calibration"):
        if plan.method == "linear":
            linear.calibrate(qnn, data, calibration)
        else:
            qdiffusion.calibrate(qnn, data, plan.recipe, calibration, weights=plan.action == "calibrate")
    run.manifest["reconstruction_errors"] = calibration.errors
    run.manifest["stored_activations_peak_bytes"] = calibration.storage.peak
    notes = {"method": plan.method, "seed": seed, "samples": len(data), "plan": plan.to_dict()}
    save_checkpoint(qnn, finished, notes=notes)
    journal.discard()
    run.save_manifest()
    log.info("calibrated checkpoint: %s (%d bytes)", finished, finished.stat().st_size)
    return qnn


def _calibration_data(
    plan: PtqPlan,
    run: RunFolder,
    image_shape: tuple[int, ...],
    record: Callable[[int, int], dict[str, Tensor]],
) -> CalibrationSet:
    path = Path(plan.data) if plan.data is not None else run.path / RECORDING
    if plan.data is None and not path.is_file():
        log.info("recording %d samples at %d steps from the float model", plan.per_step, plan.steps)
        with run.timed("recording"), torch.no_grad():
            save_recording(record(plan.steps, plan.per_step), path)
    run.add_file("calibration data", path)
    return select_samples(load_recording(path), plan.steps, plan.per_step, image_shape, source=path)


@torch.no_grad()
def measure_noise_error(qnn: QuantModel, held_out: dict[str, Tensor], batch_size: int = 64) -> dict[str, float]:
    """Return how far the quantized ε is from the float ε on held-out network inputs.

    Args:
        held_out: a recording that calibration did not see.

    Returns:
        ``mse``, the mean squared difference over all elements; ``float_mean_square``, the same of ε itself; and the
        number of ``samples``.
    """
    x, t = held_out["xs"].flatten(0, 1), held_out["ts"].flatten(0, 1)
    error = reference = 0.0
    for start in range(0, len(x), batch_size):
        part = x[start : start + batch_size].to(qnn.device), t[start : start + batch_size].to(qnn.device)
        wanted = qnn(*part).double()
        with qnn.quantized():
            error += float((qnn(*part).double() - wanted).square().sum())
        reference += float(wanted.square().sum())
    return {"mse": error / x.numel(), "float_mean_square": reference / x.numel(), "samples": len(x)}
