"""DDIM and DDPM sampling, and every sampler's golden values.

The golden file holds final samples of published code with the closed-form noise prediction
ε(x, t, c) = 0.6 x + 0.3 sin(x + t/250) + 0.1 c.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qdiff.errors import UserError
from qdiff.sampling import (
    DiffusionSchedule,
    ImageNoise,
    make_beta_schedule,
    sample_ddpm_noisy,
    sample_dpm_solver,
    sample_generalized,
    select_timesteps,
)

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "samplers.pth", weights_only=True)
GOLDEN_TOLERANCE = 1e-5  # relative L2; float32 rounding gives below 1e-6
VARIANCE_TOLERANCE = 0.07  # relative; five standard errors √(2/N) of a variance of N = 10,000 samples

DDPM = make_beta_schedule("linear", 1e-4, 0.02, 1000)
LATENT = make_beta_schedule("scaled_linear", 0.0015, 0.0195, 1000)
STABLE = make_beta_schedule("scaled_linear", 0.00085, 0.012, 1000)


def closed_form_eps(x, t, c=None):
    e = 0.6 * x + 0.3 * torch.sin(x + t.to(x.dtype).view(-1, 1, 1, 1) / 250)
    return e if c is None else e + 0.1 * c.to(x).view(-1, 1, 1, 1)


def guided_eps(scale):
    def eps(x, t):
        eps_u, eps_c = closed_form_eps(x, t, GOLDEN["uncond"]), closed_form_eps(x, t, GOLDEN["cond"])
        return eps_u + scale * (eps_c - eps_u)

    return eps


def relative_error(out, expected):
    return float((out.cpu() - expected).norm() / expected.norm())


# golden case -> (eps, betas, timesteps, does it end at ᾱ_0 instead of 1)
DDIM_CASES = {
    f"ddim_generalized_{kind}_{n}": (closed_form_eps, DDPM, select_timesteps(kind, n, 1000), False)
    for kind in ("uniform", "quad")
    for n in (10, 100)
}
for _n in (20, 50, 200):
    _times = select_timesteps("uniform", _n, 1000, offset=1)
    DDIM_CASES[f"ldm_ddim_{_n}"] = (closed_form_eps, LATENT, _times, True)
    DDIM_CASES[f"ldm_ddim_{_n}_cfg3"] = (guided_eps(3.0), LATENT, _times, True)


def ddim_error(case, *, shift=0, beta_factor=1.0, final_alpha_bar=None, device="cpu"):
    """Relative error against the golden sample, with an optional planted mistake."""
    eps, betas, timesteps, ends_early = DDIM_CASES[case]
    schedule = DiffusionSchedule(betas * beta_factor)
    if final_alpha_bar is None:
        final_alpha_bar = float(schedule.alphas_cumprod[0]) if ends_early else 1.0
    timesteps = [t + shift for t in timesteps]
    x_T = GOLDEN["x_T"].to(device)
    out = sample_generalized(eps, x_T, schedule, timesteps, final_alpha_bar=final_alpha_bar)
    return relative_error(out, GOLDEN[case])


def dpm_error(steps, device="cpu", **options):
    out = sample_dpm_solver(guided_eps(7.5), GOLDEN["x_T"].to(device), DiffusionSchedule(STABLE), steps, **options)
    return relative_error(out, GOLDEN[f"ldm_dpm_{steps}_cfg7.5"])


@pytest.mark.parametrize("case", DDIM_CASES)
def test_ddim_golden(case):
    assert ddim_error(case) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("case", DDIM_CASES)
def test_ddim_golden_tolerance_catches_planted_errors(case):
    assert ddim_error(case, shift=1) > 10 * GOLDEN_TOLERANCE
    assert ddim_error(case, beta_factor=1.001) > 10 * GOLDEN_TOLERANCE
    if DDIM_CASES[case][3]:
        assert ddim_error(case, final_alpha_bar=1.0) > 10 * GOLDEN_TOLERANCE


@pytest.mark.parametrize("kind", ["uniform", "quad"])
@pytest.mark.parametrize("n", [10, 100])
def test_ddim_timesteps_golden(kind, n):
    assert select_timesteps(kind, n, 1000) == GOLDEN[f"ddim_generalized_{kind}_{n}_seq"].tolist()


@pytest.mark.parametrize("n", [20, 50, 200])
def test_latent_timesteps_golden(n):
    assert select_timesteps("uniform", n, 1000, offset=1) == GOLDEN[f"ldm_ddim_{n}_timesteps"].tolist()


@pytest.mark.parametrize("steps", [10, 20])
def test_dpm_solver_golden(steps):
    assert dpm_error(steps) < GOLDEN_TOLERANCE


def test_dpm_solver_golden_tolerance_catches_planted_errors():
    assert dpm_error(10, lower_order_final=False) > 10 * GOLDEN_TOLERANCE
    for steps in (10, 20):
        assert dpm_error(steps, order=1) > 10 * GOLDEN_TOLERANCE
        assert dpm_error(steps, order=3) > 10 * GOLDEN_TOLERANCE
        assert dpm_error(steps, method="singlestep") > 10 * GOLDEN_TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_golden_on_cuda():
    for case in DDIM_CASES:
        assert ddim_error(case, device="cuda") < GOLDEN_TOLERANCE
    assert dpm_error(10, device="cuda") < GOLDEN_TOLERANCE


# --- Gaussian data N(MEAN, SPREAD²): the exact ε and the exact distribution of the samples are known ---

MEAN, SPREAD = 0.1, 0.2  # narrow enough that clipping to [−1, 1] changes nothing
GAUSSIAN = DiffusionSchedule(DDPM)


def gaussian_eps(x, t):
    """E[ε | x_t] = √(1−ᾱ) (x_t − √ᾱ μ) / (ᾱ s² + 1 − ᾱ)."""
    a = GAUSSIAN.alphas_cumprod[t].to(x.dtype).view(-1, 1, 1, 1)
    return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * SPREAD**2 + 1 - a)


def ancestral_variance(timesteps, larger):
    """Variance of the final sample when every step draws from N(mean of q(x_s|x_t, x̂_0), β or β̃)."""
    variance = 1.0
    bars = [1.0] + [float(GAUSSIAN.alphas_cumprod[t]) for t in timesteps]
    for k in range(len(timesteps), 0, -1):
        a, a_s = bars[k], bars[k - 1]
        # q(x_s | x_t, x_0) from x_t|x_s ~ N(√r x_s, 1 − r) and x_s|x_0 ~ N(√a_s x_0, 1 − a_s)
        r = a / a_s
        posterior = 0.0 if a_s == 1.0 else 1.0 / (r / (1 - r) + 1 / (1 - a_s))
        from_x0 = 1.0 if a_s == 1.0 else posterior * a_s**0.5 / (1 - a_s)
        from_xt = 0.0 if a_s == 1.0 else posterior * r**0.5 / (1 - r)
        gain = from_xt + from_x0 * a**0.5 * SPREAD**2 / (a * SPREAD**2 + 1 - a)  # x̂_0 is linear in x_t
        noise = 0.0 if k == 1 else (1 - r if larger else posterior)
        variance = gain**2 * variance + noise
    return variance


def gaussian_samples(sampler, timesteps, noise=None):
    """10,000 scalar samples, as one image [1, 1, 100, 100]."""
    noise = noise or ImageNoise(3, [0], (1, 100, 100))
    x_T = ImageNoise(4, [0], (1, 100, 100)).draw()
    if sampler == "ddpm":
        return sample_ddpm_noisy(gaussian_eps, x_T, GAUSSIAN, timesteps, noise)
    return sample_generalized(gaussian_eps, x_T, GAUSSIAN, timesteps, eta=1.0, noise=noise)


@pytest.mark.parametrize("sampler", ["ddpm", "eta 1"])
def test_all_steps_give_the_variance_of_the_data(sampler):
    x = gaussian_samples(sampler, range(1000))
    # beyond the sampling error, 1000 steps leave a bias of +1 % (ddpm) and −4 % (η = 1)
    assert abs(float(x.var()) / SPREAD**2 - 1) < VARIANCE_TOLERANCE + 0.04
    assert abs(float(x.mean()) - MEAN) < 5 * SPREAD / 100


@pytest.mark.parametrize("sampler", ["ddpm", "eta 1"])
@pytest.mark.parametrize("timesteps", [range(0, 1000, 20), range(1000)], ids=["50", "1000"])
def test_variance_is_that_of_the_ancestral_chain(sampler, timesteps):
    """Sharper: few steps bias the variance by up to a third, and by exactly this much."""
    expected = ancestral_variance(timesteps, larger=sampler == "ddpm")
    assert abs(float(gaussian_samples(sampler, timesteps).var()) / expected - 1) < VARIANCE_TOLERANCE


class ScaledNoise:
    def __init__(self, factor):
        self.source, self.factor = ImageNoise(3, [0], (1, 100, 100)), factor

    def draw(self):
        return self.factor * self.source.draw()


@pytest.mark.parametrize("sampler", ["ddpm", "eta 1"])
def test_variance_tolerance_catches_a_planted_error(sampler):
    timesteps = range(0, 1000, 20)
    expected = ancestral_variance(timesteps, larger=sampler == "ddpm")
    x = gaussian_samples(sampler, timesteps, noise=ScaledNoise(1.1))
    assert abs(float(x.var()) / expected - 1) > VARIANCE_TOLERANCE


def test_ddpm_clips_the_predicted_image():
    seen = []
    x_T = torch.tensor([-50.0, 50.0]).view(1, 1, 1, 2)
    noise = ImageNoise(0, [0], (1, 1, 2))
    sample_ddpm_noisy(lambda x, t: torch.zeros_like(x), x_T, GAUSSIAN, TIMES, noise, on_step=lambda *s: seen.append(s))
    assert seen[0][3].flatten().tolist() == [-1.0, 1.0]
    assert all(float(x0.abs().max()) <= 1.0 for *_, x0 in seen)


# --- what all samplers have in common ---

TIMES = [0, 300, 600, 900]
SAMPLERS = {
    "ddim": lambda eps, x, **kw: sample_generalized(eps, x, GAUSSIAN, TIMES, **kw),
    "eta": lambda eps, x, **kw: sample_generalized(
        eps, x, GAUSSIAN, TIMES, eta=0.5, noise=ImageNoise(0, range(len(x)), x.shape[1:]), **kw
    ),
    "ddpm": lambda eps, x, **kw: sample_ddpm_noisy(
        eps, x, GAUSSIAN, TIMES, ImageNoise(0, range(len(x)), x.shape[1:]), **kw
    ),
    "dpm": lambda eps, x, **kw: sample_dpm_solver(eps, x, GAUSSIAN, 4, **kw),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_shape_and_times(sampler, dtype):
    times = []

    def eps(x, t):
        assert x.dtype == dtype and t.shape == (2,) and not torch.is_grad_enabled()
        times.append(t)
        return 0.1 * x

    x_T = GOLDEN["x_T"].to(dtype)
    before = x_T.clone()
    out = SAMPLERS[sampler](eps, x_T)
    assert out.dtype == dtype and out.shape == x_T.shape and torch.equal(x_T, before)
    if sampler == "dpm":
        assert {t.dtype for t in times} == {torch.promote_types(dtype, torch.float32)}
        assert [float(t[0]) for t in times] == pytest.approx([999, 749.25, 499.5, 249.75])
    else:
        assert {t.dtype for t in times} == {torch.int64}
        assert [int(t[0]) for t in times] == TIMES[::-1]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_on_step_sees_every_step(sampler):
    seen = []
    out = SAMPLERS[sampler](closed_form_eps, GOLDEN["x_T"], on_step=lambda *s: seen.append(s))
    assert [i for i, *_ in seen] == [0, 1, 2, 3]
    assert seen[0][1] == (999 if sampler == "dpm" else 900)
    assert torch.equal(seen[-1][2], out)
    if sampler != "dpm":  # the last step goes to ᾱ = 1, so it ends on the predicted image
        torch.testing.assert_close(seen[-1][3], out)
    a = float(GAUSSIAN.alphas_cumprod[-1 if sampler == "dpm" else 900])
    x0 = (GOLDEN["x_T"] - (1 - a) ** 0.5 * closed_form_eps(GOLDEN["x_T"], torch.tensor(seen[0][1]))) / a**0.5
    torch.testing.assert_close(seen[0][3], x0.clamp(-1, 1) if sampler == "ddpm" else x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_gradients(sampler):
    x_T = GOLDEN["x_T"].clone().requires_grad_()
    assert not SAMPLERS[sampler](closed_form_eps, x_T).requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_do_not_depend_on_the_batch(sampler):
    both = SAMPLERS[sampler](closed_form_eps, GOLDEN["x_T"])
    torch.testing.assert_close(SAMPLERS[sampler](closed_form_eps, GOLDEN["x_T"][:1]), both[:1])


def test_eta_zero_never_draws():
    class Refuses:
        def draw(self):
            raise AssertionError("drew noise")

    SAMPLERS["ddim"](closed_form_eps, GOLDEN["x_T"], noise=Refuses())


@pytest.mark.parametrize(("eta", "says"), [(0.5, "noise source"), (-0.1, "from 0"), (1.5, "from 0")])
def test_bad_eta(eta, says):
    with pytest.raises(UserError, match=says):
        SAMPLERS["ddim"](closed_form_eps, GOLDEN["x_T"], eta=eta)
