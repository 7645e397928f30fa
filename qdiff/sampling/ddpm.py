"""Ancestral DDPM sampling over a subsequence of the training timesteps (``--sample_type ddpm_noisy``)."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from qdiff.sampling.correction import noise_std
from qdiff.sampling.interface import NoisePrediction, NoiseSource, OnStep
from qdiff.sampling.schedule import DiffusionSchedule


def sample_ddpm_noisy(
    eps: NoisePrediction,
    x_T: Tensor,
    schedule: DiffusionSchedule,
    timesteps: Sequence[int],
    noise: NoiseSource,
    *,
    error_std: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with DDPM's larger variance, σ_t² = β_t.

    Between neighbouring times s < t of the subsequence, the effective β is 1 − ᾱ_t/ᾱ_s. The predicted clean image is
    clipped to [−1, 1], so this sampler is for images, not for latents. The last step adds no noise (z = 0 in algorithm
    2).

    Args:
        eps: the network, called once per timestep with t int64 [N].
        x_T: starting noise [N, C, H, W]; the result keeps its device and dtype.
        schedule: ᾱ_t of the network's training.
        timesteps: visited times, ascending (`select_timesteps`).
        noise: drawn from once per noisy step.
        error_std: standard deviation of ε's random error, [steps, C or 1]; so much less noise is added (`noise_std`).
            It is taken as it would be without clipping.
        on_step: see `qdiff.sampling.interface`; x0_pred is the clipped prediction.

    Returns:
        The final sample, [N, C, H, W].

    Raises:
        UserError: the timesteps are invalid.

    Source: Ho et al. 2020, algorithm 2 and eq. (7); DDIM's released code for the subsequence and clipping.
    """
    steps = schedule.steps(timesteps)
    last = len(steps) - 1
    # 0 if quad spacing repeats a timestep; the step then changes nothing
    betas = [1.0 - a / a_next for _, a, a_next in steps]
    weights = [-beta * sqrt(a_next / (a * (1.0 - a))) for (_, a, a_next), beta in zip(steps, betas, strict=True)]
    added = noise_std(betas, weights, error_std, x_T)
    x = x_T
    with torch.no_grad():
        for i, ((t, a, a_next), beta) in enumerate(zip(steps, betas, strict=True)):
            e = eps(x, torch.full((len(x),), t, dtype=torch.int64, device=x.device))
            x0 = ((x - sqrt(1.0 - a) * e) / sqrt(a)).clamp(-1.0, 1.0)
            # eq. (7), the mean of q(x_s | x_t, x_0)
            x = (sqrt(a_next) * beta / (1.0 - a)) * x0 + (sqrt(1.0 - beta) * (1.0 - a_next) / (1.0 - a)) * x
            if i < last and beta > 0.0:
                x = x + added[i] * noise.draw().to(x)
            if on_step:
                on_step(i, t, x, x0)
    return x
