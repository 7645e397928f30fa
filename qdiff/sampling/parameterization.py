"""What a network predicts, and how the noise ε that samplers use follows from it."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from qdiff.sampling.interface import NoisePrediction
from qdiff.sampling.schedule import DiffusionSchedule


class Parameterization(str, Enum):
    """The network's output at x_t = √ᾱ x_0 + √(1−ᾱ) ε, under the names of latent diffusion's configs."""

    EPS = "eps"  # ε
    X0 = "x0"  # x_0
    V = "v"  # √ᾱ ε − √(1−ᾱ) x_0 (Salimans & Ho 2022, section 4)


def as_noise_prediction(
    network: NoisePrediction, schedule: DiffusionSchedule, kind: Parameterization
) -> NoisePrediction:
    """Return ε(x, t) for a network that predicts ``kind``; for ε, the network itself.

    Between timesteps, where DPM-Solver evaluates, log ᾱ is interpolated linearly, as DPM-Solver itself does.

    Args:
        network: takes x [N, …] and t [N].
        schedule: ᾱ_t of the network's training.
    """
    if kind is Parameterization.EPS:
        return network
    log_alphas = 0.5 * schedule.alphas_cumprod.log()  # of √ᾱ, float64 [T]

    def eps(x: Tensor, t: Tensor) -> Tensor:
        nonlocal log_alphas
        log_alphas = log_alphas.to(x.device)  # once; indexed on the device, because reading t would wait for the GPU
        below = t.long().clamp(0, len(log_alphas) - 1)
        above, share = (below + 1).clamp(max=len(log_alphas) - 1), t.double() - below
        log_alpha = torch.where(
            share > 0, log_alphas[below] + share * (log_alphas[above] - log_alphas[below]), log_alphas[below]
        )
        shape = (len(x), *[1] * (x.dim() - 1))
        dtype = torch.promote_types(x.dtype, torch.float32)
        alpha = log_alpha.exp().to(dtype).view(shape)
        sigma = (-torch.expm1(2.0 * log_alpha)).sqrt().to(dtype).view(shape)
        predicted = network(x, t)
        if kind is Parameterization.V:
            return alpha * predicted + sigma * x
        return (x - alpha * predicted) / sigma

    return eps


def training_target(kind: Parameterization, x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return what a network of ``kind`` should predict at x_t = √ᾱ x_0 + √(1−ᾱ) ε; ᾱ broadcasts to x_0."""
    if kind is Parameterization.EPS:
        return noise
    if kind is Parameterization.X0:
        return x_0
    return alpha_bar.sqrt() * noise - (1.0 - alpha_bar).sqrt() * x_0
