"""The samplers by name, one row for all model families. A new sampler is a file next to this one and a row below.

SAMPLERS["ddim"].sample(eps, x_T, SamplingRun(schedule, timesteps, SamplerOptions(eta=0.5), noise))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from qdiff.errors import UserError
from qdiff.sampling.ddim import sample_ddim
from qdiff.sampling.ddpm import sample_ddpm_noisy
from qdiff.sampling.dpm_solver import SolverMethod, sample_dpm_solver
from qdiff.sampling.interface import NoisePrediction, NoiseSource, OnStep
from qdiff.sampling.plms import plms_calls, sample_plms
from qdiff.sampling.schedule import DiffusionSchedule, select_timesteps


@dataclass(frozen=True)
class SamplerOptions:
    """How a model is sampled.

    Attributes:
        kind: a name in `SAMPLERS`.
        steps: number of sampling steps.
        spacing: ``uniform`` or ``quad``, for samplers that do not space their steps themselves.
        offset: added to every timestep; latent diffusion samples with 1.
        ends_clean: whether the last step goes to ᾱ = 1; latent diffusion's samplers stop at ᾱ_0.
        eta: η of DDIM.
        order, method: order and method of DPM-Solver++.
        scale: scale of classifier-free guidance; 1 evaluates only the condition.
        fixed_code: image i starts from the noise of image i mod this number; None gives each image its own noise.
    """

    kind: str = "ddim"
    steps: int = 1000
    spacing: str = "uniform"
    offset: int = 0
    ends_clean: bool = True
    eta: float = 0.0
    order: int = 2
    method: str = "multistep"
    scale: float = 1.0
    fixed_code: int | None = None


@dataclass(frozen=True)
class SamplingRun:
    """The arguments of a sampler besides ε and x_T.

    Attributes:
        schedule: ᾱ_t of the network's training.
        timesteps: visited times, ascending.
        options: see `SamplerOptions`.
        noise: drawn from once per noisy step.
        on_step: see `qdiff.sampling.interface`.
        error_std: standard deviation of ε's random error at each network call, [calls, C or 1]; samplers that add noise
            add so much less. None is 0.
    """

    schedule: DiffusionSchedule
    timesteps: Sequence[int]
    options: SamplerOptions
    noise: NoiseSource
    on_step: OnStep | None = None
    error_std: Tensor | None = None

    @property
    def final_alpha_bar(self) -> float:
        """ᾱ after the last step."""
        return 1.0 if self.options.ends_clean else float(self.schedule.alphas_cumprod[0])


def _spaced(options: SamplerOptions, num_train: int) -> list[int]:
    return select_timesteps(options.spacing, options.steps, num_train, options.offset)


def _all(options: SamplerOptions, num_train: int) -> list[int]:
    return list(range(num_train))


def _unplaced(options: SamplerOptions, num_train: int) -> list[int]:
    """Only the number of steps is checked."""
    return select_timesteps(options.spacing, options.steps, num_train)


def _one_per_timestep(options: SamplerOptions, timesteps: Sequence[int]) -> int:
    return len(timesteps)


def _steps(options: SamplerOptions, timesteps: Sequence[int]) -> int:
    return options.steps


@dataclass(frozen=True)
class SamplerRow:
    """A sampler.

    Attributes:
        name: value of `SamplerOptions.kind` and of ``--sampler``.
        title: name in help texts.
        sample: ``(eps, x_T, run)`` returns the final sample, [N, C, H, W].
        timesteps: ``(options, T)`` returns the visited times, ascending, and checks their number.
        calls: ``(options, timesteps)`` returns how often the network is called.
        has_eta: whether it uses ``eta``; for other samplers, η above 0 is an error.
        clips: whether it clips the predicted x_0 to [−1, 1], which suits images but not latents.
        places_steps: whether it places its steps itself; a number of steps that does not divide T is then allowed.
        takes_all: whether it visits all training timesteps, whatever number of steps is requested.
        sample_type: value of ``--sample_type`` if it differs from the name.
    """

    name: str
    title: str
    sample: Callable[[NoisePrediction, Tensor, SamplingRun], Tensor]
    timesteps: Callable[[SamplerOptions, int], list[int]] = _spaced
    calls: Callable[[SamplerOptions, Sequence[int]], int] = _one_per_timestep
    has_eta: bool = False
    clips: bool = False
    places_steps: bool = False
    takes_all: bool = False
    sample_type: str | None = None

    @property
    def option(self) -> str:
        """Value of the DDIM script's ``--sample_type``."""
        return self.sample_type or self.name


def _ddim(eps: NoisePrediction, x_T: Tensor, run: SamplingRun) -> Tensor:
    return sample_ddim(
        eps,
        x_T,
        run.schedule,
        run.timesteps,
        eta=run.options.eta,
        noise=run.noise,
        final_alpha_bar=run.final_alpha_bar,
        error_std=run.error_std,
        on_step=run.on_step,
    )


def _ancestral(eps: NoisePrediction, x_T: Tensor, run: SamplingRun) -> Tensor:
    return sample_ddim(
        eps,
        x_T,
        run.schedule,
        run.timesteps,
        eta=1.0,
        noise=run.noise,
        error_std=run.error_std,
        on_step=run.on_step,
    )


def _ddpm_noisy(eps: NoisePrediction, x_T: Tensor, run: SamplingRun) -> Tensor:
    return sample_ddpm_noisy(
        eps, x_T, run.schedule, run.timesteps, run.noise, error_std=run.error_std, on_step=run.on_step
    )


def _dpm_solver(eps: NoisePrediction, x_T: Tensor, run: SamplingRun) -> Tensor:
    o = run.options
    method = SolverMethod(o.method)
    return sample_dpm_solver(eps, x_T, run.schedule, o.steps, order=o.order, method=method, on_step=run.on_step)


def _plms(eps: NoisePrediction, x_T: Tensor, run: SamplingRun) -> Tensor:
    final = run.final_alpha_bar
    return sample_plms(eps, x_T, run.schedule, run.timesteps, final_alpha_bar=final, on_step=run.on_step)


_ROWS = (
    SamplerRow("ddim", "DDIM", _ddim, has_eta=True, sample_type="generalized"),
    SamplerRow("ddpm_noisy", "DDPM with the larger variance", _ddpm_noisy, clips=True),
    SamplerRow("dpm_solver", "DPM-Solver++", _dpm_solver, timesteps=_unplaced, calls=_steps, places_steps=True),
    SamplerRow("plms", "PLMS", _plms, calls=lambda _, timesteps: plms_calls(timesteps)),
    SamplerRow("ancestral", "DDPM over all training steps", _ancestral, timesteps=_all, takes_all=True),
)
SAMPLERS: dict[str, SamplerRow] = {row.name: row for row in _ROWS}


def find_sampler(name: str) -> SamplerRow:
    """Return a sampler by its name.

    Raises:
        UserError: no sampler has this name.
    """
    if name not in SAMPLERS:
        raise UserError(f"the sampler is {name!r}; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def sample_types() -> dict[str, str]:
    """Return the values of the DDIM script's ``--sample_type``, each with the name of its sampler."""
    return {row.option: row.name for row in SAMPLERS.values()}
