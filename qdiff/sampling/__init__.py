"""Samplers: functions of (noise prediction, x_T, schedule, noise source). They know of no network."""

from qdiff.sampling.ddim import sample_generalized
from qdiff.sampling.ddpm import sample_ddpm_noisy
from qdiff.sampling.dpm_solver import SolverMethod, sample_dpm_solver
from qdiff.sampling.interface import NoisePrediction, NoiseSource, OnStep
from qdiff.sampling.noise import CALIBRATION_STREAM, ImageNoise
from qdiff.sampling.parameterization import Parameterization, as_noise_prediction, training_target
from qdiff.sampling.plms import plms_calls, sample_plms
from qdiff.sampling.schedule import (
    BetaKind,
    DiffusionSchedule,
    SkipKind,
    make_beta_schedule,
    select_timesteps,
)

__all__ = [
    "CALIBRATION_STREAM",
    "BetaKind",
    "DiffusionSchedule",
    "ImageNoise",
    "NoisePrediction",
    "NoiseSource",
    "OnStep",
    "Parameterization",
    "SkipKind",
    "SolverMethod",
    "as_noise_prediction",
    "make_beta_schedule",
    "plms_calls",
    "sample_ddpm_noisy",
    "sample_dpm_solver",
    "sample_generalized",
    "sample_plms",
    "select_timesteps",
    "training_target",
]
