"""Training noise as the configs of diffusers' schedulers describe it, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from qdiff.errors import UserError
from qdiff.sampling.parameterization import Parameterization
from qdiff.sampling.registry import SamplerOptions
from qdiff.sampling.schedule import COSINE_OFFSET, BetaKind
from qdiff.sampling.training_noise import TrainingNoise

NAMES = {
    BetaKind.LINEAR: "linear",
    BetaKind.SCALED_LINEAR: "scaled_linear",
    BetaKind.QUAD: "scaled_linear",  # two names of ours for one shape
    BetaKind.COSINE: "squaredcos_cap_v2",
}
PREDICTIONS = {Parameterization.EPS: "epsilon", Parameterization.X0: "sample", Parameterization.V: "v_prediction"}
# What diffusers' schedulers assume where a config says nothing.
DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
SAME_BETAS = 1e-5  # relative: a list of β_t may have been rounded to float32


def scheduler_config(noise: TrainingNoise, options: SamplerOptions) -> dict[str, Any]:
    """Return the arguments of a ``DDIMScheduler`` that samples as our DDIM sampler does.

    Both visit the same timesteps if the number of steps divides T; otherwise ours takes more steps than were requested.

    Args:
        options: of the family's sampler: the first timestep, and where the last step ends.
    """
    kind = BetaKind(noise.kind)
    config = {
        "num_train_timesteps": noise.count,
        "beta_start": noise.start,
        "beta_end": noise.end,
        "rescale_betas_zero_snr": noise.zero_terminal_snr,
        "prediction_type": PREDICTIONS[noise.parameterization],
        "timestep_spacing": "leading",
        "steps_offset": options.offset,
        "set_alpha_to_one": options.ends_clean,
        "clip_sample": False,
    }
    if kind in NAMES and (kind is not BetaKind.COSINE or noise.cosine_offset == COSINE_OFFSET):
        return config | {"beta_schedule": NAMES[kind]}
    return config | {"trained_betas": noise.betas().tolist()}


def training_noise_of(scheduler: Mapping[str, Any], origin: str) -> TrainingNoise:
    """Return the training noise in the config of any of diffusers' schedulers.

    Args:
        origin: the config's name in error messages.

    Raises:
        UserError: the papers' code has no such schedule.
    """
    config = DEFAULTS | scheduler
    predicted, shape = config["prediction_type"], config["beta_schedule"]
    if predicted not in PREDICTIONS.values():
        raise UserError(f"{origin} has prediction_type {predicted}; choose one of {', '.join(PREDICTIONS.values())}")
    betas = config["trained_betas"]
    if betas is None and shape not in NAMES.values():
        names = ", ".join(dict.fromkeys(NAMES.values()))
        raise UserError(f"{origin} has beta_schedule {shape}; choose one of {names}")

    def noise(kind: BetaKind) -> TrainingNoise:
        return TrainingNoise(
            kind,
            config["beta_start"],
            config["beta_end"],
            config["num_train_timesteps"] if betas is None else len(betas),
            zero_terminal_snr=bool(config["rescale_betas_zero_snr"]),
            parameterization=next(kind for kind, name in PREDICTIONS.items() if name == predicted),
        )

    if betas is None:
        return noise(next(kind for kind, name in NAMES.items() if name == shape))
    for kind in [kind for kind in BetaKind if kind is not BetaKind.QUAD]:  # the same as SCALED_LINEAR
        if _makes(noise(kind), betas):
            return noise(kind)
    raise UserError(f"{origin} has trained_betas of none of the papers' schedules; give a beta_schedule instead")


def _makes(noise: TrainingNoise, betas: list[float]) -> bool:
    try:
        return torch.allclose(noise.betas(), torch.tensor(betas, dtype=torch.float64), rtol=SAME_BETAS, atol=0.0)
    except UserError:  # start and end do not suit the kind
        return False
