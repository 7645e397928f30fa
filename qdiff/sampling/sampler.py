"""One front for all samplers and model families: it selects the images, their noise and their conditions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.sampling.guidance import guided
from qdiff.sampling.interface import Correction, Network, NoisePrediction, OnCall, OnStep
from qdiff.sampling.noise import CALIBRATION_STREAM, ImageNoise
from qdiff.sampling.parameterization import Parameterization, as_noise_prediction
from qdiff.sampling.registry import SamplerOptions, SamplingRun, find_sampler
from qdiff.sampling.schedule import DiffusionSchedule


class Sampler:
    """Samples images or latents; the noise of image i depends only on (seed, i).

    Args:
        schedule: ᾱ_t of the network's training.
        shape: (C, H, W) of one image or latent.
        options: see `SamplerOptions`.
        seed: the run's seed.
        parameterization: what the network predicts.

    Attributes:
        timesteps: visited times, ascending, unless the sampler places its steps itself.
        calls: network calls per run.

    Raises:
        UserError: options are out of range or contradict each other.
    """

    def __init__(
        self,
        schedule: DiffusionSchedule,
        shape: tuple[int, int, int],
        options: SamplerOptions,
        seed: int,
        parameterization: Parameterization = Parameterization.EPS,
    ) -> None:
        self.schedule, self.shape, self.options, self.seed = schedule, tuple(shape), options, seed
        self.parameterization, self._row = parameterization, find_sampler(options.kind)
        if options.eta > 0 and not self._row.has_eta:
            raise UserError(f"eta is {options.eta} but {self._row.title} has no eta; leave it out")
        if not 0 <= options.eta <= 1:
            raise UserError(f"eta is {options.eta}; give a number from 0 to 1")
        if not math.isfinite(options.scale):
            raise UserError(f"the guidance scale is {options.scale}; give a finite number")
        self.timesteps = self._row.timesteps(options, schedule.num_train)
        self.calls = self._row.calls(options, self.timesteps)

    def visited(self) -> list[float]:
        """Return the timestep of every network call of a run, in order."""
        times: list[float] = []

        def listen(x: Tensor, t: Tensor) -> Tensor:
            times.append(float(t[0]))
            return torch.zeros_like(x)

        noise = ImageNoise(self.seed, [0], (1, 1, 1), "cpu")
        self._row.sample(listen, noise.draw(), SamplingRun(self.schedule, self.timesteps, self.options, noise, None))
        return times

    def with_steps(self, steps: int) -> Sampler:
        """Return a sampler of much the same result in fewer steps: DDIM if this one clips or takes all steps."""
        options = replace(self.options, steps=steps)
        if self._row.clips or self._row.takes_all:
            options = replace(options, kind="ddim", eta=1.0)
        return Sampler(self.schedule, self.shape, options, self.seed, self.parameterization)

    def __call__(
        self,
        network: Network,
        rows: Sequence[int],
        device: torch.device | str = "cpu",
        condition: Tensor | None = None,
        unconditional: Tensor | None = None,
        calibration: bool = False,
        on_call: OnCall | None = None,
        on_step: OnStep | None = None,
        correction: Correction | None = None,
    ) -> Tensor:
        """Return the images or latents numbered ``rows``, [N, C, H, W], in the range that the network was trained on.

        Args:
            network: predicts ε(x, t[, context]), or what ``parameterization`` says.
            device: the device of x_T, and so of the whole run.
            condition, unconditional: [N, L, D] for conditional networks; see `guided`.
            calibration: use the calibration streams instead of the run's.
            on_call: called for every network call, before guidance doubles the batch.
            on_step: see `qdiff.sampling.interface`.
            correction: applied to ε after guidance.
        """
        predicted = self.noise_prediction(network, condition, unconditional)

        def eps(x: Tensor, t: Tensor) -> Tensor:
            if on_call is not None:
                on_call(x, t, condition, unconditional)
            return predicted(x, t)

        used = eps if correction is None else correction.applied_to(eps)
        error_std = None if correction is None else correction.error_std
        noise = ImageNoise(self.seed + (CALIBRATION_STREAM if calibration else 0), rows, self.shape, device)
        x_T, shared = noise.draw(), self.options.fixed_code
        if shared is not None and not calibration:
            x_T = ImageNoise(self.seed, [i % shared for i in rows], self.shape, device).draw()
        run = SamplingRun(self.schedule, self.timesteps, self.options, noise, on_step, error_std)
        return self._row.sample(used, x_T, run)

    def noise_prediction(
        self, network: Network, condition: Tensor | None = None, unconditional: Tensor | None = None
    ) -> NoisePrediction:
        """Return ε(x, t) after guidance, as the sampler uses it; arguments as above."""
        # Guidance and the conversion to ε commute: both are linear in the prediction.
        guided_network = guided(network, condition, unconditional, self.options.scale)
        return as_noise_prediction(guided_network, self.schedule, self.parameterization)
