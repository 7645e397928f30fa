"""The samplers of a latent diffusion model behind one set of options, with classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from qdiff.calibration.recording import OnCall
from qdiff.errors import UserError
from qdiff.sampling import (
    CALIBRATION_STREAM,
    DiffusionSchedule,
    ImageNoise,
    NoisePrediction,
    OnStep,
    Parameterization,
    as_noise_prediction,
    plms_calls,
    sample_dpm_solver,
    sample_generalized,
    sample_plms,
    select_timesteps,
)


class SamplerKind(str, Enum):
    """Which sampler."""

    DDIM = "ddim"
    PLMS = "plms"
    DPM_SOLVER = "dpm_solver"  # DPM-Solver++ 2M
    ANCESTRAL = "ancestral"  # DDPM over all training steps (``--vanilla_sample``)


@dataclass(frozen=True)
class LatentSamplerOptions:
    """How a latent model is sampled.

    Attributes:
        steps: of the sampler; ancestral sampling takes all training steps.
        eta: η of DDIM.
        scale: of classifier-free guidance; 1 evaluates the condition alone.
        fixed_code: images share the starting noise of image i mod this number; None gives each its own.
    """

    kind: SamplerKind = SamplerKind.DDIM
    steps: int = 50
    eta: float = 0.0
    scale: float = 1.0
    fixed_code: int | None = None


def guided(
    network: Callable[..., Tensor], condition: Tensor | None, unconditional: Tensor | None, scale: float
) -> NoisePrediction:
    """Return ε_u + scale·(ε_c − ε_u) as a function of (x, t); one call of the network on both halves.

    Args:
        network: ε(x, t[, context]).
        condition: [N, L, D], or None for an unconditional network.
        unconditional: likewise; None evaluates the condition alone.

    Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", in the form of the latent diffusion samplers.
    """
    if condition is None:
        return network
    if unconditional is None:
        return lambda x, t: network(x, t, condition)
    context = torch.cat([unconditional, condition])

    def eps(x: Tensor, t: Tensor) -> Tensor:
        without, with_ = network(torch.cat([x, x]), torch.cat([t, t]), context).chunk(2)
        return without + scale * (with_ - without)

    return eps


class LatentSampler:
    """Samples latents; the noise of image i depends on (seed, i) alone.

    Args:
        schedule: ᾱ_t of the model.
        shape: (C, h, w) of a latent.
        options: see `LatentSamplerOptions`.
        seed: the run's seed.
        device: where sampling runs.
        parameterization: what the network predicts.

    Raises:
        UserError: options out of range.
    """

    def __init__(
        self,
        schedule: DiffusionSchedule,
        shape: tuple[int, int, int],
        options: LatentSamplerOptions,
        seed: int,
        device: torch.device,
        parameterization: Parameterization = Parameterization.EPS,
    ) -> None:
        self.parameterization = parameterization
        self.schedule, self.shape, self.options, self.seed, self.device = schedule, shape, options, seed, device
        if not 0 <= options.eta <= 1:
            raise UserError(f"eta is {options.eta}; give a number from 0 to 1")
        if not math.isfinite(options.scale):
            raise UserError(f"the guidance scale is {options.scale}; give a finite number")
        if options.kind is SamplerKind.ANCESTRAL:
            self.timesteps = list(range(schedule.num_train))
        else:
            # DPM-Solver spaces its steps itself: only their number is checked.
            offset = 0 if options.kind is SamplerKind.DPM_SOLVER else 1
            self.timesteps = select_timesteps("uniform", options.steps, schedule.num_train, offset)

    @property
    def calls(self) -> int:
        """How often one run calls the network."""
        if self.options.kind is SamplerKind.DPM_SOLVER:
            return self.options.steps
        return plms_calls(self.timesteps) if self.options.kind is SamplerKind.PLMS else len(self.timesteps)

    def __call__(
        self,
        network: Callable[..., Tensor],
        indices: Sequence[int],
        condition: Tensor | None = None,
        unconditional: Tensor | None = None,
        calibration: bool = False,
        on_call: OnCall | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Return the latents numbered ``indices``, [N, C, h, w].

        Args:
            network: ε(x, t[, context]), or what else the sampler was told that it predicts.
            condition, unconditional: [N, L, D] where the network is conditional; see `guided`.
            calibration: draw from the calibration streams instead of the run's.
            on_call: told of every network call, before guidance doubles the batch.
            on_step: see `qdiff.sampling.interface`.
        """
        o = self.options
        # Guidance and the conversion commute: both are linear in the prediction.
        guided_network = guided(network, condition, unconditional, o.scale)
        predicted = as_noise_prediction(guided_network, self.schedule, self.parameterization)

        def eps(x: Tensor, t: Tensor) -> Tensor:
            if on_call is not None:
                on_call(x, t, condition, unconditional)
            return predicted(x, t)

        noise = ImageNoise(self.seed + (CALIBRATION_STREAM if calibration else 0), indices, self.shape, self.device)
        x_T = noise.draw()
        if o.fixed_code is not None and not calibration:
            x_T = ImageNoise(self.seed, [i % o.fixed_code for i in indices], self.shape, self.device).draw()
        if o.kind is SamplerKind.DPM_SOLVER:
            return sample_dpm_solver(eps, x_T, self.schedule, o.steps, order=2, on_step=on_step)
        if o.kind is SamplerKind.ANCESTRAL:
            return sample_generalized(eps, x_T, self.schedule, self.timesteps, eta=1.0, noise=noise, on_step=on_step)
        final = float(self.schedule.alphas_cumprod[0])  # latent diffusion's samplers stop at ᾱ_0
        if o.kind is SamplerKind.PLMS:
            return sample_plms(eps, x_T, self.schedule, self.timesteps, final_alpha_bar=final, on_step=on_step)
        return sample_generalized(
            eps,
            x_T,
            self.schedule,
            self.timesteps,
            eta=o.eta,
            noise=noise,
            final_alpha_bar=final,
            on_step=on_step,
        )
