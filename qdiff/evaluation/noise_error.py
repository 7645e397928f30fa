"""Error of a quantized network's ε against the float network's."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qdiff.calibration.samples import CalibrationSet
from qdiff.quant_model import QuantModel

Precision = Callable[[], contextlib.AbstractContextManager]


@torch.no_grad()
def measure_noise_error(
    qnn: QuantModel,
    held_out: CalibrationSet,
    batch_size: int = 64,
    release: bool = False,
    precision: Precision = contextlib.nullcontext,
    last_call: CalibrationSet | None = None,
) -> dict[str, float]:
    """Return the error of ε, as computed in sampling, against the float ε on held-out network inputs.

    Args:
        held_out: inputs that are not in the calibration set.
        precision: context in which the quantized network runs, as in sampling (autocast, or none). The float network
            runs without it, so that an overflow of half precision counts as an error of the quantized network.
        release: release the float weights after their output is computed (`QuantModel.release_float_weights`).
        last_call: inputs of the sampler's last call, whose error is told apart and is in no mean.

    Returns:
        ``mse``, the mean squared difference over all elements; ``float_mean_square``, the mean square of the float ε;
        the number of ``samples``; ``median_step``, the median over timesteps of each one's mean squared difference.
        With ``last_call`` also its mean squared difference ``last_step``, and ``last_timestep``, its t.
    """
    batches, last = _batches(held_out, batch_size), [] if last_call is None else _batches(last_call, batch_size)
    found = _squares(qnn, [*batches, *last], release, precision)
    count, elements = len(batches), held_out.inputs[0].numel()
    by_sample = torch.cat(found.by_sample[:count]) / held_out.inputs[0][0].numel()
    error = {
        "mse": sum(found.errors[:count]) / elements,
        "float_mean_square": sum(found.squares[:count]) / elements,
        "samples": len(held_out),
        "median_step": _median_of_steps(by_sample, held_out.inputs[1]),
    }
    if last_call is not None:
        error["last_step"] = sum(found.errors[count:]) / last_call.inputs[0].numel()
        error["last_timestep"] = float(last_call.inputs[1][0])
    return error


def _batches(samples: CalibrationSet, batch_size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(i.split(batch_size) for i in samples.inputs), strict=True))


def _median_of_steps(errors: Tensor, timesteps: Tensor) -> float:
    """Return the median over timesteps of the mean at each.

    Args:
        errors: [N], of every sample.
        timesteps: [N], of every sample.
    """
    return statistics.median(float(errors[timesteps == t].mean()) for t in timesteps.unique())


@torch.no_grad()
def measure_trajectory_error(
    qnn: QuantModel,
    calls: Sequence[tuple[Tensor, ...]],
    compared: Sequence[int],
    release: bool = False,
    precision: Precision = contextlib.nullcontext,
) -> dict[str, Any]:
    """Return the error of ε for a network that modulates, which runs along a trajectory of the float model.

    Args:
        calls: the network's inputs at every call of a sampling run, in order; each [N, …].
        compared: the calls that ``mse`` is the mean over.
        release, precision: as in `measure_noise_error`.

    Returns:
        As `measure_noise_error` with the last of these calls, plus ``by_call``, the mean squared difference at every
        call. ``median_step`` is the median over the compared calls.
    """
    found = _squares(qnn, calls, release, precision)
    elements = calls[0][0].numel()
    by_call = [error / elements for error in found.errors]
    return {
        "mse": sum(found.errors[i] for i in compared) / elements / len(compared),
        "float_mean_square": sum(found.squares[i] for i in compared) / elements / len(compared),
        "samples": len(calls[0][0]) * len(compared),
        "by_call": by_call,
        "median_step": statistics.median(by_call[i] for i in compared),
        "last_step": by_call[-1],
        "last_timestep": float(calls[-1][1][0]),
    }


class _Squares(NamedTuple):
    """Sums of squares per batch: of the differences from float, and of float ε; the former also by sample, [N] each."""

    errors: list[float]
    squares: list[float]
    by_sample: list[Tensor]


def _squares(qnn: QuantModel, batches: Sequence[tuple[Tensor, ...]], release: bool, precision: Precision) -> _Squares:
    batches = [tuple(part.to(qnn.device) for part in batch) for batch in batches]
    wanted = [qnn(*batch).double() for batch in batches]
    if release:
        qnn.release_float_weights()
    sums = []
    with precision(), qnn.quantized(), qnn.trajectory():  # entered once, because entering dequantizes all weights
        for batch, exact in zip(batches, wanted, strict=True):
            squared = (qnn(*batch).double() - exact).square()
            sums.append((squared.sum(), squared.flatten(1).sum(1)))
    errors, by_sample = zip(*sums, strict=True)
    return _Squares(
        [float(error) for error in errors],
        [float(exact.square().sum()) for exact in wanted],
        [sample.cpu() for sample in by_sample],
    )
