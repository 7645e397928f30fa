"""Samplers as functions of (ε, x_T, schedule, …), and one front for them; nothing here depends on a model family.

sampler = Sampler(schedule, (3, 32, 32), SamplerOptions("ddim", steps=100), seed=1234)
images = sampler(network, rows=range(16), device="cuda")
"""

from qdiff.sampling.correction import NoiseCorrection
from qdiff.sampling.ddim import sample_ddim
from qdiff.sampling.ddpm import sample_ddpm_noisy
from qdiff.sampling.dpm_solver import SolverMethod, sample_dpm_solver
from qdiff.sampling.guidance import guided
from qdiff.sampling.interface import Correction, Network, NoisePrediction, NoiseSource, OnCall, OnStep
from qdiff.sampling.noise import CALIBRATION_STREAM, ImageNoise
from qdiff.sampling.parameterization import Parameterization, as_noise_prediction, training_target
from qdiff.sampling.plms import plms_calls, sample_plms
from qdiff.sampling.registry import SAMPLERS, SamplerOptions, find_sampler
from qdiff.sampling.sampler import Sampler
from qdiff.sampling.schedule import (
    BetaKind,
    DiffusionSchedule,
    SkipKind,
    make_beta_schedule,
    select_timesteps,
)
from qdiff.sampling.training_noise import TrainingNoise

__all__ = [
    "CALIBRATION_STREAM",
    "SAMPLERS",
    "BetaKind",
    "Correction",
    "DiffusionSchedule",
    "ImageNoise",
    "Network",
    "NoiseCorrection",
    "NoisePrediction",
    "NoiseSource",
    "OnCall",
    "OnStep",
    "Parameterization",
    "Sampler",
    "SamplerOptions",
    "SkipKind",
    "SolverMethod",
    "TrainingNoise",
    "as_noise_prediction",
    "find_sampler",
    "guided",
    "make_beta_schedule",
    "plms_calls",
    "sample_ddim",
    "sample_ddpm_noisy",
    "sample_dpm_solver",
    "sample_plms",
    "select_timesteps",
    "training_target",
]
