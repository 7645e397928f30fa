"""A correction of ε while sampling: one map per call, and less added noise for the error that remains."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
import torch

from qdiff.errors import UserError
from qdiff.sampling import (
    SAMPLERS,
    DiffusionSchedule,
    NoiseCorrection,
    Parameterization,
    Sampler,
    SamplerOptions,
    make_beta_schedule,
    sample_ddim,
    sample_ddpm_noisy,
    select_timesteps,
)

SCHEDULE = DiffusionSchedule(make_beta_schedule("linear", 1e-4, 0.02, 1000))
SHORT = DiffusionSchedule(make_beta_schedule("linear", 1e-3, 0.1, 40))
TIMES = select_timesteps("uniform", 10, 1000)
# Relative L2 in float64; rounding gives 1e-15.
CLOSE = 1e-12


class Zeros:
    """A noise source without noise."""

    def __init__(self, shape=(2, 3, 4, 4)):
        self.shape = shape

    def draw(self):
        return torch.zeros(self.shape, dtype=torch.float64)


class Listed:
    """A noise source that gives listed draws."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def draw(self):
        return next(self.draws)


def eps(x, t):
    return 0.6 * x + 0.3 * torch.sin(x + t.to(x.dtype).view(-1, 1, 1, 1) / 250)


def tables(calls, channels=3, seed=0):
    made = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(calls, channels, generator=made, dtype=torch.float64)  # noqa: E731
    return 0.9 + 0.2 * draw(), 0.1 * draw() - 0.05, 0.2 * draw()


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def wanted_ddim(x, scale, shift, std, draws, eta, factor=1.0):
    """DDIM in numpy, with σ'² = σ² − c²s²; ``factor`` scales s."""
    bars = np.cumprod(1.0 - SCHEDULE.betas.double().numpy())
    x, per_channel = x.numpy(), lambda row: row.numpy()[None, :, None, None]
    for i, t in enumerate(reversed(TIMES)):
        a, b = bars[t], bars[TIMES[-i - 2]] if i + 1 < len(TIMES) else 1.0
        e = 0.6 * x + 0.3 * np.sin(x + t / 250)
        e = per_channel(scale[i]) * e + per_channel(shift[i])
        variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        c = sqrt(1 - b - variance) - sqrt(b * (1 - a) / a)
        left = np.maximum(variance - (c * factor * per_channel(std[i])) ** 2, 0)
        x = sqrt(b) * (x - sqrt(1 - a) * e) / sqrt(a) + sqrt(1 - b - variance) * e
        x = x + np.sqrt(left) * (draws[i].numpy() if variance > 0 else 0)
    return torch.from_numpy(x)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_in_float64(eta):
    torch.manual_seed(1)
    x_T, draws = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(10, 2, 3, 4, 4, dtype=torch.float64)
    scale, shift, std = tables(10)
    correction = NoiseCorrection(tuple(map(float, reversed(TIMES))), scale, shift, std)
    found = sample_ddim(correction.applied_to(eps), x_T, SCHEDULE, TIMES, eta=eta, noise=Listed(draws), error_std=std)
    assert relative(found, wanted_ddim(x_T, scale, shift, std, draws, eta)) < CLOSE
    assert relative(found, wanted_ddim(x_T, scale.flip(0), shift, std, draws, eta)) > 1e3 * CLOSE
    if eta > 0:
        assert relative(found, wanted_ddim(x_T, scale, shift, std, draws, eta, factor=1.01)) > 1e3 * CLOSE


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_the_variance_that_an_error_brings_is_what_is_not_added(kind):
    """c is how far the next state moves with ε, so that c²s² + σ'² is σ² again."""
    x_T = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    states = {}

    def one_run(shift, noise, std):
        seen = []
        other = dict(noise=noise, on_step=lambda i, t, x, x0: seen.append(float(x)))
        error_std = None if std is None else torch.full((2, 1), std, dtype=torch.float64)
        constant = lambda x, t: torch.full_like(x, shift)  # noqa: E731
        if kind == "ddim":
            sample_ddim(constant, x_T, SCHEDULE, [300, 400], eta=0.8, error_std=error_std, **other)
        else:
            sample_ddpm_noisy(constant, x_T, SCHEDULE, [300, 400], error_std=error_std, **other)
        return seen[0]

    ones = lambda: Listed(torch.ones(2, 1, 1, 1, 1, dtype=torch.float64))  # noqa: E731
    zeros = Zeros((1, 1, 1, 1))
    step = 1e-3  # x_0 stays inside of DDPM's clipping
    states["c"] = (one_run(step, zeros, None) - one_run(0.0, zeros, None)) / step
    variance = (one_run(0.0, ones(), None) - one_run(0.0, zeros, None)) ** 2
    left = (one_run(0.0, ones(), 0.5) - one_run(0.0, zeros, None)) ** 2
    assert left + (0.5 * states["c"]) ** 2 == pytest.approx(variance, rel=1e-9)
    assert left < 0.99 * variance
    # More error than noise: nothing is added, and the excess stays.
    assert one_run(0.0, ones(), 1e3) == one_run(0.0, zeros, None)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_correction_that_changes_nothing(name):
    sampler = Sampler(SHORT, (2, 4, 4), SamplerOptions(name, 5, eta=0.5 if name == "ddim" else 0.0), seed=3)
    times = sampler.visited()
    assert len(times) == sampler.calls
    heard = []
    plain = sampler(eps, [0, 7], on_call=lambda x, t, *_: heard.append(float(t[0])))
    assert heard == times, "the times of a run without a network are those of a run"
    one = torch.ones(len(times), 1, dtype=torch.float64)
    nothing = NoiseCorrection(tuple(times), one, one - 1, one - 1)
    assert torch.equal(sampler(eps, [0, 7], correction=nothing), plain)
    other = NoiseCorrection(tuple(times), 1.01 * one, one - 1, one - 1)
    assert not torch.equal(sampler(eps, [0, 7], correction=other), plain)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_planted_affine_error_is_undone(name):
    """Each call has its own entry, also the two of PLMS's first step and those between timesteps."""
    options = SamplerOptions(name, 5, method="singlestep", order=3)
    sampler = Sampler(SHORT, (2, 4, 4), options, seed=3)
    times = sampler.visited()
    scale, shift, _ = tables(len(times), 2)
    count = iter(range(len(times)))

    def wrong(x, t):
        call = next(count)
        return ((eps(x, t).double() - shift[call].view(-1, 1, 1)) / scale[call].view(-1, 1, 1)).float()

    correction = NoiseCorrection(tuple(times), scale, shift, torch.zeros_like(scale))
    found, wanted = sampler(wrong, [0, 1], correction=correction), sampler(eps, [0, 1])
    assert relative(found, wanted) < 1e-4, "float32"
    count = iter(range(len(times)))
    assert relative(sampler(wrong, [0, 1]), wanted) > 1e-2


@pytest.mark.parametrize("kind", [Parameterization.V, Parameterization.X0])
def test_it_is_applied_to_guided_noise(kind):
    """After guidance and the conversion to ε, whatever the network predicts."""
    sampler = Sampler(SCHEDULE, (1, 4, 4), SamplerOptions("ddim", 2, scale=3.0), 3, kind)
    context = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    seen = []

    class Heard:
        error_std = None

        def applied_to(self, predicted):
            def heard(x, t):
                seen.append((x, t, predicted(x, t)))
                return seen[-1][-1]

            return heard

    def network(x, t, context):
        return 0.5 * x + 0.1 * context.view(-1, 1, 1, 1)

    sampler(network, [0], "cpu", *context, correction=Heard())
    for x, t, found in seen:
        a = float(SCHEDULE.alphas_cumprod[t])
        guided = 0.5 * x + 0.1 * 3.0
        of_v, of_x0 = sqrt(a) * guided + sqrt(1 - a) * x, (x - sqrt(a) * guided) / sqrt(1 - a)
        wanted = of_v if kind is Parameterization.V else of_x0
        torch.testing.assert_close(found, wanted)


def test_more_calls_than_entries():
    one = torch.ones(3, 1, dtype=torch.float64)
    correction = NoiseCorrection((900.0, 500.0, 0.0), one, one, one)
    with pytest.raises(UserError, match="entries for 3 network calls but the sampler makes more"):
        Sampler(SCHEDULE, (1, 4, 4), SamplerOptions("plms", 4), 0)(eps, [0], correction=correction)
    with pytest.raises(UserError, match="error_std has 3 rows for 4 sampling steps"):
        Sampler(SCHEDULE, (1, 4, 4), SamplerOptions("ddim", 4), 0)(eps, [0], correction=correction)


def test_bad_tables():
    one = torch.ones(3, 2, dtype=torch.float64)
    for broken in (one[:2], one[:, :1], one[0]):
        with pytest.raises(UserError, match="has shift of shape"):
            NoiseCorrection((3.0, 2.0, 1.0), one, broken, one)
    with pytest.raises(UserError, match="has error_std that is not finite"):
        NoiseCorrection((3.0, 2.0, 1.0), one, one, one / 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ddim", "ddpm_noisy", "plms"])
def test_no_step_waits_for_a_gpu(name, cuda):
    sampler = Sampler(SCHEDULE, (2, 4, 4), SamplerOptions(name, 5, eta=1.0 if name == "ddim" else 0.0), seed=3)
    times = sampler.visited()
    correction = NoiseCorrection(tuple(times), *tables(len(times), 2))
    with cuda.counting() as counts:
        found = sampler(eps, [0, 1], "cuda", correction=correction)
    assert counts.launches > 0 and counts.waits == [] and counts.pageable("qdiff/sampling/") == []
    torch.testing.assert_close(found.cpu(), sampler(eps, [0, 1], correction=correction))


@torch.no_grad()
def test_half_precision_is_corrected_in_float32():
    one = torch.ones(1, 1, dtype=torch.float64)
    correction = NoiseCorrection((1.0,), one, 1e-4 * one, one)
    predicted = correction.applied_to(lambda x, t: x.to(torch.float16))
    found = predicted(torch.ones(1, 1, 2, 2), torch.zeros(1))
    assert found.dtype == torch.float32 and float(found[0, 0, 0, 0]) == pytest.approx(1.0001, abs=1e-6)
