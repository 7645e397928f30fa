"""Schedules as configs of diffusers' schedulers: the same ᾱ and timesteps as there, and the same description back."""

from __future__ import annotations

import pytest
import torch

from qdiff.errors import UserError
from qdiff.sampling import (
    BetaKind,
    Parameterization,
    SamplerOptions,
    TrainingNoise,
    as_noise_prediction,
    sample_ddim,
    select_timesteps,
)
from qdiff.sampling.diffusers_scheduler import scheduler_config, training_noise_of

diffusers = pytest.importorskip("diffusers")

STEPS = 5
# Theirs multiplies β in float32, ours in float64: relative to ᾱ, which falls to 4e-5.
BARS_TOLERANCE = 1e-4
X_TOLERANCE = 1e-5  # of samples of order 1, for the same reason
FAMILIES = {"ddim": SamplerOptions(steps=STEPS), "ldm": SamplerOptions(steps=STEPS, offset=1, ends_clean=False)}


def noise(kind: BetaKind, **others) -> TrainingNoise:
    return TrainingNoise(kind, 1e-4, 2e-2, 100, **others)


@pytest.mark.parametrize("kind", BetaKind)
def test_the_same_schedule_there_and_back(kind):
    given = noise(kind)
    config = scheduler_config(given, FAMILIES["ddim"])
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.double()
    ours = given.schedule().alphas_cumprod
    assert float(((theirs - ours) / ours.clamp(min=1e-5)).abs().max()) < BARS_TOLERANCE
    back = training_noise_of(config, "x")
    assert torch.equal(back.betas(), given.betas())
    assert ("trained_betas" in config) == (kind in (BetaKind.CONST, BetaKind.JSD, BetaKind.SIGMOID, BetaKind.SQRT))


def test_what_a_config_may_leave_out():
    default = training_noise_of({}, "x")
    assert default == TrainingNoise(BetaKind.LINEAR, 1e-4, 2e-2, 1000)
    saved = dict(diffusers.PNDMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction").config)
    made = training_noise_of(saved, "x")
    assert (made.kind, made.parameterization) == (BetaKind.SCALED_LINEAR, Parameterization.V)


def test_zero_snr_and_another_cosine():
    given = noise(BetaKind.LINEAR, zero_terminal_snr=True, parameterization=Parameterization.V)
    config = scheduler_config(given, FAMILIES["ldm"])
    theirs = diffusers.DDIMScheduler(**config).alphas_cumprod.double()
    assert float((theirs - given.schedule().alphas_cumprod).abs().max()) < 1e-6
    assert training_noise_of(config, "x") == given
    assert "trained_betas" in scheduler_config(noise(BetaKind.COSINE, cosine_offset=0.02), FAMILIES["ldm"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", Parameterization)
def test_sampling_with_their_scheduler(family, kind):
    options, given = FAMILIES[family], noise(BetaKind.SCALED_LINEAR, parameterization=kind)
    scheduler = diffusers.DDIMScheduler(**scheduler_config(given, options))
    scheduler.set_timesteps(STEPS)
    schedule = given.schedule()
    timesteps = select_timesteps("uniform", STEPS, 100, options.offset)
    assert scheduler.timesteps.tolist() == timesteps[::-1]
    torch.manual_seed(0)
    x = start = torch.randn(2, 1, 2, 2, dtype=torch.float64)

    def network(x, t):
        return torch.tanh(x + t.reshape(-1, 1, 1, 1) / 100)

    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    end = 1.0 if options.ends_clean else float(schedule.alphas_cumprod[0])
    eps = as_noise_prediction(network, schedule, kind)
    expected = sample_ddim(eps, start, schedule, timesteps, final_alpha_bar=end)
    assert float((x - expected).abs().max()) < X_TOLERANCE
    # Planted: the other family's end.
    other = float(schedule.alphas_cumprod[0]) if options.ends_clean else 1.0
    planted = sample_ddim(eps, start, schedule, timesteps, final_alpha_bar=other)
    assert float((planted - expected).abs().max()) > X_TOLERANCE


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {"beta_schedule": "exponential"},
            "x has beta_schedule exponential; choose one of linear, scaled_linear",
        ),
        ({"prediction_type": "flow"}, "x has prediction_type flow; choose one of epsilon"),
        (
            {"trained_betas": [0.1, 0.3, 0.1]},
            "x has trained_betas of none of the papers' schedules; give",
        ),
    ],
)
def test_schedules_that_the_papers_do_not_have(config, match):
    with pytest.raises(UserError, match=match):
        training_noise_of(config, "x")
