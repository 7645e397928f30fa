"""ε of the float and of the quantized network on the same inputs, along trajectories of the float network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.calibration.storage import ActivationStorage
from qdiff.errors import UserError
from qdiff.io.progress import progress_bar
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel
from qdiff.sampling import NoisePrediction


@dataclass(frozen=True)
class NoisePairs:
    """ε at every network call of a sampling run, after guidance.

    Attributes:
        times: the timestep of each call, in the order of the calls.
        exact, quantized: per call [N, C, H, W], of the float and of the quantized network, on the CPU.
    """

    times: tuple[float, ...]
    exact: Sequence[Tensor]
    quantized: Sequence[Tensor]


class _Trajectory:
    """Keeps x and ε of every call of a run, and corrects nothing."""

    error_std = None

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def applied_to(self, eps: NoisePrediction) -> NoisePrediction:
        def heard(x: Tensor, t: Tensor) -> Tensor:
            found = eps(x, t)
            self.calls.append((x.cpu(), t, found.cpu()))
            return found

        return heard


@torch.no_grad()
def collect_noise_pairs(
    pipeline: Pipeline,
    qnn: QuantModel,
    rows: Sequence[int],
    storage: ActivationStorage | None = None,
    show_progress: bool = True,
) -> NoisePairs:
    """Sample images of the calibration streams from the float network, and run the quantized one on the same inputs.

    Args:
        pipeline: its weights must be loaded, its network wrapped by ``qnn``.
        qnn: calibrated, with its float weights.
        rows: numbers of the images.
        storage: holds the result; None uses RAM.

    Raises:
        UserError: ε of one of the networks is not finite.
    """
    storage, sampler = storage or ActivationStorage(), pipeline.sampler
    times = sampler.visited()
    held = [storage.empty((2, len(rows), *sampler.shape), torch.float32) for _ in times]
    with progress_bar(total=len(rows), desc="comparing ε", unit="img", disable=not show_progress) as bar:
        for first in range(0, len(rows), pipeline.batch_size):
            batch = rows[first : first + pipeline.batch_size]
            part = slice(first, first + len(batch))
            trajectory, contexts = _Trajectory(), []

            def on_call(x: Tensor, t: Tensor, *context: Tensor | None, contexts: list = contexts) -> None:
                contexts[:] = context

            pipeline.sample(pipeline.network, batch, calibration=True, on_call=on_call, correction=trajectory)
            with pipeline.precision(), qnn.quantized():
                eps = sampler.noise_prediction(qnn, *contexts)
                for pair, (x, t, exact) in zip(held, trajectory.calls, strict=True):
                    pair[0, part] = exact
                    pair[1, part] = eps(x.to(pipeline.device), t).cpu()
            bar.update(len(batch))
    for t, pair in zip(times, held, strict=True):
        if not bool(torch.isfinite(pair).all()):
            raise UserError(
                f"ε is not finite at timestep {t:g}, and no noise correction can be fitted; give --precision full if "
                "half precision overflows, otherwise check the weights"
            )
    return NoisePairs(tuple(times), [pair[0] for pair in held], [pair[1] for pair in held])
