"""PLMS: DDIM's step, taken with a noise prediction extrapolated from earlier ones (``--plms``)."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.sampling.interface import NoisePrediction, OnStep
from qdiff.sampling.schedule import DiffusionSchedule

ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the latest noise predictions, latest first, per order. They assume equal steps."""

MAX_ORDER = max(ADAMS_BASHFORTH)


def plms_calls(timesteps: Sequence[int]) -> int:
    """Return how often `sample_plms` calls the network: once per timestep, and once more in the first step.

    The network is called, in this order, at the last timestep T, the one before it (T again if there is no other), that
    same one again, and then the remaining ones downwards.

    Raises:
        UserError: there are no timesteps.
    """
    if len(timesteps) == 0:
        raise UserError("there are no sampling timesteps; give at least 1")
    return len(timesteps) + 1


def sample_plms(
    eps: NoisePrediction,
    x_T: Tensor,
    schedule: DiffusionSchedule,
    timesteps: Sequence[int],
    *,
    final_alpha_bar: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with the pseudo linear multistep method. It is deterministic and has no η.

    The first step is a pseudo improved Euler step, which calls the network twice; the next ones are Adams-Bashforth
    steps of order 2, 3 and, from the fourth step on, 4. As published, the weights assume equal steps whatever the
    spacing, so the method is accurate only with ``uniform`` timesteps.

    Args:
        eps: the network, called `plms_calls` times with t int64 [N].
        x_T: starting noise [N, C, H, W]; the result keeps its device and dtype.
        schedule: ᾱ_t of the network's training.
        timesteps: visited times, ascending (`select_timesteps`).
        final_alpha_bar: ᾱ after the last step; see `DiffusionSchedule.steps`.
        on_step: see `qdiff.sampling.interface`; one call per timestep, also for the first step. x0_pred follows from
            the extrapolated noise prediction.

    Returns:
        The final sample, [N, C, H, W].

    Raises:
        UserError: the timesteps or final_alpha_bar are invalid.

    Source: Liu et al. 2022 (arXiv 2202.09778), pseudo linear multi-step method; latent diffusion's released code
    for the start (the paper's fourth-order method starts with Runge-Kutta) and for a run of one timestep.
    """
    steps = schedule.steps(timesteps, final_alpha_bar)
    second_t = steps[min(1, len(steps) - 1)].t
    x = x_T
    history: list[Tensor] = []  # raw noise predictions, latest first
    with torch.no_grad():
        for i, (t, a, a_next) in enumerate(steps):
            history = [eps(x, _batch_of(t, x)), *history[: MAX_ORDER - 1]]
            if i == 0:
                euler, _ = _transfer(x, history[0], a, a_next)
                # not kept in the history, because the next step predicts at this time again from a better x
                e = 0.5 * (history[0] + eps(euler, _batch_of(second_t, x)))
            else:
                e = sum(w * past for w, past in zip(ADAMS_BASHFORTH[len(history)], history, strict=True))
            x, x0 = _transfer(x, e, a, a_next)
            if on_step:
                on_step(i, t, x, x0)
    return x


def _batch_of(t: int, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.int64, device=x.device)


def _transfer(x: Tensor, e: Tensor, a: float, a_next: float) -> tuple[Tensor, Tensor]:
    """DDIM's step with η = 0 from ᾱ = ``a`` to ``a_next``: the new state, and the predicted x_0."""
    x0 = (x - sqrt(1.0 - a) * e) / sqrt(a)
    return sqrt(a_next) * x0 + sqrt(1.0 - a_next) * e, x0
