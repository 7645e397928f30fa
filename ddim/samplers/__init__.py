"""Samplers: functions of (noise prediction, x_T, schedule, noise source). They know of no network."""

from ddim.samplers.ddpm import sample_ddpm_noisy
from ddim.samplers.dpm_solver import SolverMethod, sample_dpm_solver
from ddim.samplers.generalized import sample_generalized
from ddim.samplers.interface import NoisePrediction, NoiseSource, OnStep
from ddim.samplers.noise import CALIBRATION_STREAM, ImageNoise
from ddim.samplers.parameterization import Parameterization, as_noise_prediction, training_target
from ddim.samplers.plms import plms_calls, sample_plms
from ddim.samplers.schedule import (
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
