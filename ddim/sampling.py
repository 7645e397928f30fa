"""The samplers of a DDIM model behind one set of options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ddim.config import build_schedule, parameterization
from qdiff.errors import UserError
from qdiff.sampling import (
    CALIBRATION_STREAM,
    ImageNoise,
    NoisePrediction,
    OnStep,
    SolverMethod,
    as_noise_prediction,
    sample_ddpm_noisy,
    sample_dpm_solver,
    sample_generalized,
    select_timesteps,
)


@dataclass(frozen=True)
class SamplerOptions:
    """How a DDIM model is sampled.

    Attributes:
        kind: ``generalized`` (DDIM), ``ddpm_noisy`` or ``dpm_solver`` (DPM-Solver++).
        timesteps: number of steps.
        skip_type: ``uniform`` or ``quad`` spacing (DPM-Solver has its own).
        eta: η of DDIM.
        order, method: of DPM-Solver++.
    """

    kind: Literal["generalized", "ddpm_noisy", "dpm_solver"] = "generalized"
    timesteps: int = 1000
    skip_type: str = "uniform"
    eta: float = 0.0
    order: int = 2
    method: str = "multistep"


class DdimSampler:
    """Samples images of a config's shape; the noise of image i depends on (seed, i) alone.

    Args:
        config: a DDIM model's config.
        options: see `SamplerOptions`.
        seed: the run's seed.
        device: where sampling runs.
    """

    def __init__(self, config: Any, options: SamplerOptions, seed: int, device: torch.device) -> None:
        self.options, self.seed, self.device = options, seed, device
        self.shape = (config.data.channels, config.data.image_size, config.data.image_size)
        self.schedule, self.parameterization = build_schedule(config), parameterization(config)
        # Also checks the number of steps for DPM-Solver, which spaces them itself.
        self.timesteps = select_timesteps(options.skip_type, options.timesteps, self.schedule.num_train)
        if options.eta > 0 and options.kind != "generalized":
            raise UserError(
                f"--eta {options.eta} and --sample_type {options.kind} contradict each other; leave --eta out"
            )
        if not 0 <= options.eta <= 1:
            raise UserError(f"--eta is {options.eta}; give a number from 0 to 1")

    @property
    def calls(self) -> int:
        """How often one run calls the network."""
        return self.options.timesteps if self.options.kind == "dpm_solver" else len(self.timesteps)

    def __call__(
        self,
        network: NoisePrediction,
        indices: Sequence[int],
        on_step: OnStep | None = None,
        calibration: bool = False,
    ) -> Tensor:
        """Return the images numbered ``indices``, [N, C, H, W], in the range that the network was trained on.

        Args:
            network: ε(x, t), or what else the config says that it predicts.
            on_step: see `qdiff.sampling.interface`.
            calibration: draw from the calibration streams instead of the run's.
        """
        seed = self.seed + (CALIBRATION_STREAM if calibration else 0)
        noise = ImageNoise(seed, indices, self.shape, self.device)
        x_T, o = noise.draw(), self.options
        eps = as_noise_prediction(network, self.schedule, self.parameterization)
        if o.kind == "generalized":
            return sample_generalized(eps, x_T, self.schedule, self.timesteps, eta=o.eta, noise=noise, on_step=on_step)
        if o.kind == "ddpm_noisy":
            return sample_ddpm_noisy(eps, x_T, self.schedule, self.timesteps, noise, on_step=on_step)
        return sample_dpm_solver(
            eps,
            x_T,
            self.schedule,
            o.timesteps,
            order=o.order,
            method=SolverMethod(o.method),
            on_step=on_step,
        )
