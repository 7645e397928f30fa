"""Networks that predict x_0 or v are sampled as those that predict ε, by every sampler."""

from __future__ import annotations

import pytest
import torch

from qdiff.sampling import (
    DiffusionSchedule,
    ImageNoise,
    Parameterization,
    as_noise_prediction,
    make_beta_schedule,
    sample_ddpm_noisy,
    sample_dpm_solver,
    sample_generalized,
    sample_plms,
    select_timesteps,
    training_target,
)
from qdiff.sampling.dpm_solver import ContinuousSchedule

T = 40
SCHEDULE = DiffusionSchedule(make_beta_schedule("scaled_linear", 1e-3, 0.3, T))
SHAPE = (2, 6, 6)
OTHERS = (Parameterization.X0, Parameterization.V)


def eps(x, t):
    """Any smooth function will do as a network."""
    return torch.sin(1.3 * x + t.to(x)[:, None, None, None] / T)


def predicting(kind):
    """A network of ``kind`` that says the same as `eps`, by definitions written out at each of its points."""
    clock = ContinuousSchedule(SCHEDULE)

    def network(x, t):
        point = clock.at_time((float(t[0]) + 1.0) / T)
        noise = eps(x, t)
        x_0 = (x - point.sigma * noise) / point.alpha
        return x_0 if kind is Parameterization.X0 else point.alpha * noise - point.sigma * x_0

    return network


def samplers():
    times = select_timesteps("uniform", 8, T)
    noise = lambda: ImageNoise(3, [0, 1], SHAPE, torch.device("cpu"))  # noqa: E731
    return {
        "ddim": lambda f, x: sample_generalized(f, x, SCHEDULE, times, eta=0.7, noise=noise()),
        "ddpm": lambda f, x: sample_ddpm_noisy(f, x, SCHEDULE, times, noise()),
        "plms": lambda f, x: sample_plms(f, x, SCHEDULE, times),
        "dpm multistep": lambda f, x: sample_dpm_solver(f, x, SCHEDULE, 8),
        "dpm singlestep": lambda f, x: sample_dpm_solver(f, x, SCHEDULE, 8, order=3, method="singlestep"),
    }


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", samplers())
def test_every_sampler(name, kind):
    x_T = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sample = samplers()[name]
    expected = sample(eps, x_T)
    found = sample(as_noise_prediction(predicting(kind), SCHEDULE, kind), x_T)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sample(predicting(kind), x_T), expected, atol=1e-3)  # planted: taken for ε


def test_a_network_of_noise_is_itself():
    assert as_noise_prediction(eps, SCHEDULE, Parameterization.EPS) is eps


@pytest.mark.parametrize("kind", OTHERS)
def test_half_precision_is_converted_in_single(kind):
    converted = as_noise_prediction(lambda x, t: x.half(), SCHEDULE, kind)
    assert converted(torch.ones(1, *SHAPE), torch.tensor([3])).dtype == torch.float32


@pytest.mark.parametrize("kind", list(Parameterization))
def test_targets_are_what_sampling_undoes(kind):
    generator = torch.Generator().manual_seed(1)
    x_0, noise = (torch.randn(3, *SHAPE, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.tensor([0, 17, T - 1])
    bar = SCHEDULE.alphas_cumprod[t][:, None, None, None]
    x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * noise
    target = training_target(kind, x_0, noise, bar)
    found = as_noise_prediction(lambda x, t: target, SCHEDULE, kind)(x_t, t)
    torch.testing.assert_close(found, noise, rtol=1e-9, atol=1e-9)
