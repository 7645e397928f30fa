"""DDIM, with η from the deterministic sampler (0) to the ancestral one (1)."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.sampling.correction import noise_std
from qdiff.sampling.interface import NoisePrediction, NoiseSource, OnStep
from qdiff.sampling.schedule import DiffusionSchedule


def sample_ddim(
    eps: NoisePrediction,
    x_T: Tensor,
    schedule: DiffusionSchedule,
    timesteps: Sequence[int],
    *,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    final_alpha_bar: float = 1.0,
    error_std: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with DDIM.

    Args:
        eps: the network, called once per timestep with t int64 [N].
        x_T: starting noise [N, C, H, W]; the result keeps its device and dtype.
        schedule: ᾱ_t of the network's training.
        timesteps: visited times, ascending (`select_timesteps`).
        eta: η in [0, 1]. Above 0, every step adds noise except one that ends at ᾱ = 1.
        noise: drawn from once per noisy step; needed if eta > 0, unused if eta is 0.
        final_alpha_bar: ᾱ after the last step; see `DiffusionSchedule.steps`.
        error_std: standard deviation of ε's random error, [steps, C or 1]; so much less noise is added (`noise_std`).
        on_step: see `qdiff.sampling.interface`.

    Returns:
        The final sample, [N, C, H, W].

    Raises:
        UserError: eta is outside [0, 1], eta > 0 without a noise source, or the timesteps are invalid.

    Source: Song et al. 2021, eq. (12) for the step and (16) for σ.
    """
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta is {eta}; give a number from 0 (DDIM) to 1 (DDPM-like)")
    if eta > 0.0 and noise is None:
        raise UserError(f"eta is {eta}, so the sampler adds noise; pass a noise source, or eta=0")
    steps = schedule.steps(timesteps, final_alpha_bar)
    # σ², eq. (16)
    variances = [eta**2 * (1.0 - a_next) / (1.0 - a) * (1.0 - a / a_next) for _, a, a_next in steps]
    weights = [
        sqrt(1.0 - a_next - variance) - sqrt(a_next * (1.0 - a) / a)
        for (_, a, a_next), variance in zip(steps, variances, strict=True)
    ]
    added = noise_std(variances, weights, error_std, x_T)
    x = x_T
    with torch.no_grad():
        for i, ((t, a, a_next), variance) in enumerate(zip(steps, variances, strict=True)):
            e = eps(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))
            x0 = (x - sqrt(1.0 - a) * e) / sqrt(a)  # eq. (9), "predicted x_0"
            x = sqrt(a_next) * x0 + sqrt(1.0 - a_next - variance) * e  # "direction pointing to x_t"
            if variance > 0.0:
                x = x + added[i] * noise.draw().to(x)
            if on_step:
                on_step(i, t, x, x0)
    return x
