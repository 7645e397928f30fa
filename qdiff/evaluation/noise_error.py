"""Error of a quantized network's ε against the float network's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

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
) -> dict[str, float]:
    """Return the error of ε, as computed in sampling, against the float ε on held-out network inputs.

    Args:
        held_out: inputs that are not in the calibration set.
        precision: context in which the quantized network runs, as in sampling (autocast, or none). The float network
            runs without it, so that an overflow of half precision counts as an error of the quantized network.
        release: release the float weights after their output is computed (`QuantModel.release_float_weights`).

    Returns:
        ``mse``, the mean squared difference over all elements; ``float_mean_square``, the mean square of the float ε;
        and the number of ``samples``.
    """
    batches = list(zip(*(i.split(batch_size) for i in held_out.inputs), strict=True))
    errors, squares = _squares(qnn, batches, release, precision)
    elements = held_out.inputs[0].numel()
    return {"mse": sum(errors) / elements, "float_mean_square": sum(squares) / elements, "samples": len(held_out)}


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
        As `measure_noise_error`, plus ``by_call``, the mean squared difference at every call.
    """
    errors, squares = _squares(qnn, calls, release, precision)
    elements = calls[0][0].numel()
    return {
        "mse": sum(errors[i] for i in compared) / elements / len(compared),
        "float_mean_square": sum(squares[i] for i in compared) / elements / len(compared),
        "samples": len(calls[0][0]) * len(compared),
        "by_call": [error / elements for error in errors],
    }


def _squares(
    qnn: QuantModel, batches: Sequence[tuple[Tensor, ...]], release: bool, precision: Precision
) -> tuple[list[float], list[float]]:
    """Return the squared differences from float, and the squares of float ε, summed over each batch."""
    batches = [tuple(part.to(qnn.device) for part in batch) for batch in batches]
    wanted = [qnn(*batch).double() for batch in batches]
    if release:
        qnn.release_float_weights()
    with precision(), qnn.quantized(), qnn.trajectory():  # entered once, because entering dequantizes all weights
        errors = [float((qnn(*b).double() - w).square().sum()) for b, w in zip(batches, wanted, strict=True)]
    return errors, [float(w.square().sum()) for w in wanted]
