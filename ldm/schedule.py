"""The noise schedule that a latent diffusion config describes, and what its UNet predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdiff.sampling import BetaKind, DiffusionSchedule, Parameterization, TrainingNoise
from qdiff.sampling.schedule import COSINE_OFFSET

# "linear" in these configs means linear in √β.
BETA_SCHEDULES = {
    "linear": BetaKind.SCALED_LINEAR,
    "cosine": BetaKind.COSINE,
    "sqrt_linear": BetaKind.LINEAR,
    "sqrt": BetaKind.SQRT,
}


def training_noise(params: Mapping[str, Any]) -> TrainingNoise:
    """Return the noise that ``model.params`` describes."""
    return TrainingNoise(
        BETA_SCHEDULES[params.get("beta_schedule", "linear")],
        params.get("linear_start", 1e-4),
        params.get("linear_end", 2e-2),
        params.get("timesteps", 1000),
        params.get("cosine_s", COSINE_OFFSET),
        params.get("rescale_betas_zero_snr", False),
        Parameterization(params.get("parameterization", Parameterization.EPS.value)),
    )


def build_schedule(params: Mapping[str, Any]) -> DiffusionSchedule:
    """Return the schedule of ``model.params``."""
    return training_noise(params).schedule()


def parameterization(params: Mapping[str, Any]) -> Parameterization:
    """Return the quantity that the UNet of ``model.params`` predicts."""
    return training_noise(params).parameterization
