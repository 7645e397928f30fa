"""Latent samplers with guidance: published outputs, noise that belongs to an image, and what calibration is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.pipeline import latent_options
from ldm.schedule import build_schedule
from qdiff.errors import UserError
from qdiff.sampling import SAMPLERS, DiffusionSchedule, ImageNoise, Parameterization, Sampler, guided

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "samplers.pth", weights_only=True)
GOLDEN_TOLERANCE = 1e-5  # relative L2; float32 rounding gives below 1e-6
CONVERSION_TOLERANCE = 1e-4  # float32, 40 steps at most
SHAPE = (3, 4, 4)

LATENT = build_schedule({"linear_start": 0.0015, "linear_end": 0.0195})
STABLE = build_schedule({"linear_start": 0.00085, "linear_end": 0.012})
SHORT = build_schedule({"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 40})

CASES = {f"ldm_ddim_{n}": ("ddim", n, LATENT, None) for n in (20, 50, 200)}
CASES |= {f"ldm_ddim_{n}_cfg3": ("ddim", n, LATENT, 3.0) for n in (20, 50, 200)}
CASES |= {f"ldm_plms_{n}_cfg7.5": ("plms", n, STABLE, 7.5) for n in (20, 50)}
CASES |= {f"ldm_dpm_{n}_cfg7.5": ("dpm_solver", n, STABLE, 7.5) for n in (10, 20)}
KINDS = [(k, eta) for k in SAMPLERS if not SAMPLERS[k].clips for eta in (0.0, 0.7) if SAMPLERS[k].has_eta or eta == 0]


def network(x, t, context=None):
    """The closed form of the golden file: ε(x, t, c) = 0.6 x + 0.3 sin(x + t/250) + 0.1 c."""
    e = 0.6 * x + 0.3 * torch.sin(x + t.to(x.dtype).view(-1, 1, 1, 1) / 250)
    return e if context is None else e + 0.1 * context.view(-1, 1, 1, 1)


def context(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1)


def sampler(
    kind="ddim", steps=4, eta=0.0, scale=1.0, fixed_code=None, seed=3, schedule: DiffusionSchedule = SHORT
) -> Sampler:
    return Sampler(schedule, SHAPE, latent_options(kind, steps, eta, scale, fixed_code), seed)


def golden_error(case, monkeypatch, scale=None) -> float:
    """Relative error of a run from the golden file's starting noise."""
    kind, steps, schedule, used = CASES[case]
    monkeypatch.setattr(ImageNoise, "draw", lambda self: GOLDEN["x_T"])
    conditions = () if used is None else (context(GOLDEN["cond"]), context(GOLDEN["uncond"]))
    made = sampler(kind, steps, scale=scale or used or 1.0, schedule=schedule)(network, [0, 1], "cpu", *conditions)
    return float((made - GOLDEN[case]).norm() / GOLDEN[case].norm())


@pytest.mark.parametrize("case", CASES)
def test_published_outputs(case, monkeypatch):
    assert golden_error(case, monkeypatch) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("case", [c for c in CASES if "cfg" in c])
def test_published_outputs_tell_scales_apart(case, monkeypatch):
    assert golden_error(case, monkeypatch, scale=CASES[case][3] + 0.01) > 5 * GOLDEN_TOLERANCE


@pytest.mark.parametrize("predicts", [Parameterization.X0, Parameterization.V])
@pytest.mark.parametrize(("kind", "eta"), KINDS)
def test_networks_of_x0_and_v_under_guidance(kind, eta, predicts):
    conditions = context([1.0, 2.0]), context([-1.0, -1.0])

    def other(x, t, c):
        low = SHORT.alphas_cumprod.log()[t.long()]
        high = SHORT.alphas_cumprod.log()[(t.long() + 1).clamp(max=39)]
        bar = (low + (t - t.long()) * (high - low)).exp().to(x).view(-1, 1, 1, 1)
        noise = network(x, t, c)
        x_0 = (x - (1 - bar).sqrt() * noise) / bar.sqrt()
        return x_0 if predicts is Parameterization.X0 else bar.sqrt() * noise - (1 - bar).sqrt() * x_0

    options = latent_options(kind, 4, eta, 3.0)
    expected = Sampler(SHORT, SHAPE, options, 3)(network, [0, 1], "cpu", *conditions)
    made = Sampler(SHORT, SHAPE, options, 3, predicts)(other, [0, 1], "cpu", *conditions)
    torch.testing.assert_close(made, expected, rtol=CONVERSION_TOLERANCE, atol=CONVERSION_TOLERANCE)
    taken_for_noise = Sampler(SHORT, SHAPE, options, 3)(other, [0, 1], "cpu", *conditions)
    assert not torch.allclose(taken_for_noise, expected, rtol=0, atol=100 * CONVERSION_TOLERANCE)


def test_guidance_is_one_call_of_the_network_on_both_halves():
    calls = []

    def counted(x, t, c):
        calls.append((len(x), c.flatten().tolist()))
        return network(x, t, c)

    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([31, 7])
    condition, nothing = context([1.0, 2.0]), context([-1.0, -1.0])
    made = guided(counted, condition, nothing, 3.0)(x, t)
    assert calls == [(4, [-1.0, -1.0, 1.0, 2.0])]
    without, with_ = network(x, t, nothing), network(x, t, condition)
    torch.testing.assert_close(made, without + 3.0 * (with_ - without))


def test_scale_one_and_no_guidance_are_the_condition_alone():
    x, t, condition = torch.ones(2, *SHAPE), torch.tensor([3, 3]), context([1.0, 2.0])
    alone = network(x, t, condition)
    torch.testing.assert_close(guided(network, condition, context([9.0, 9.0]), 1.0)(x, t), alone)
    assert torch.equal(guided(network, condition, None, 7.5)(x, t), alone)
    assert torch.equal(guided(network, None, None, 7.5)(x, t), network(x, t))


# --- Noise


@pytest.mark.parametrize(("kind", "eta"), KINDS)
def test_an_image_does_not_depend_on_its_batch(kind, eta):
    make = sampler(kind, eta=eta)
    together = make(network, [0, 5, 2, 9])
    for row, index in enumerate([0, 5, 2, 9]):
        torch.testing.assert_close(make(network, [index])[0], together[row])
    assert not torch.allclose(together[0], together[1])
    assert not torch.allclose(sampler(kind, eta=eta, seed=4)(network, [0])[0], together[0])


@pytest.mark.parametrize(("kind", "eta"), KINDS)
def test_calibration_has_noise_of_its_own(kind, eta):
    make = sampler(kind, eta=eta)
    assert not torch.allclose(make(network, range(8)), make(network, range(8), calibration=True))


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_fixed_code_repeats_the_starting_noise_alone(eta):
    starts: dict[int, torch.Tensor] = {}

    def keep(x, t, *_):
        if int(t[0]) == 31:
            starts[len(starts)] = x

    free, fixed = sampler(eta=eta), sampler(eta=eta, fixed_code=2)
    made = fixed(network, range(4), on_call=keep)
    assert torch.equal(starts[0][:2], starts[0][2:]) and not torch.equal(starts[0][0], starts[0][1])
    assert torch.equal(made[:2], made[2:]) == (eta == 0)  # the noise of later steps stays an image's own
    assert torch.equal(made[:2], free(network, [0, 1]))
    calibrated = [make(network, range(4), calibration=True) for make in (free, fixed)]
    assert torch.equal(*calibrated)  # images that all start alike would be a poor calibration set


def test_eta_adds_noise():
    assert not torch.allclose(sampler(eta=0.0)(network, [0]), sampler(eta=0.7)(network, [0]))


def test_ancestral_sampling_is_ddpm_over_all_training_steps(monkeypatch):
    """Mean and variance of the posterior q(x_{t−1} | x_t, x_0), written out (Ho et al. 2020, eq. 7)."""
    draws = [torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(40)]

    left = iter(draws)
    monkeypatch.setattr(ImageNoise, "draw", lambda self: next(left))
    made = sampler("ancestral")(network, [0])
    x, betas = draws[0], SHORT.betas.double()
    bars = torch.cat([torch.ones(1, dtype=torch.float64), SHORT.alphas_cumprod])
    for step, t in enumerate(reversed(range(40))):
        beta, bar, before = float(betas[t]), float(bars[t + 1]), float(bars[t])
        x_0 = (x - (1 - bar) ** 0.5 * network(x, torch.tensor([t]))) / bar**0.5
        mean = before**0.5 * beta / (1 - bar) * x_0 + (1 - beta) ** 0.5 * (1 - before) / (1 - bar) * x
        x = mean if t == 0 else mean + (beta * (1 - before) / (1 - bar)) ** 0.5 * draws[step + 1]
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)


# --- Calls


@pytest.mark.parametrize(
    ("kind", "steps", "calls"),
    [
        ("ddim", 4, 4),
        ("ddim", 6, 7),  # 40 steps by sixes: the published spacing gives one more than asked for
        ("plms", 4, 5),  # the first step calls twice
        ("dpm_solver", 4, 4),
        ("dpm_solver", 37, 37),
        ("ancestral", 4, 40),
    ],
)
def test_number_of_calls(kind, steps, calls):
    make, seen = sampler(kind, steps, scale=3.0), []

    def keep(x, t, condition, unconditional):
        seen.append((tuple(x.shape), t.tolist(), condition, unconditional))

    condition, nothing = context([1.0, 2.0]), context([0.0, 0.0])
    make(network, [4, 5], "cpu", condition, nothing, on_call=keep)
    assert make.calls == len(seen) == calls
    # Told of the batch as it is before guidance doubles it.
    assert all(shape == (2, *SHAPE) and c is condition and u is nothing for shape, _, c, u in seen)
    times = [t[0] for _, t, _, _ in seen]
    assert times == sorted(times, reverse=True) and times[0] > times[-1] >= 0


def test_latent_times_begin_at_one():
    seen: list[int] = []
    sampler(steps=4)(network, [0], on_call=lambda x, t, *_: seen.append(int(t[0])))
    assert seen == [31, 21, 11, 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"eta": 1.5}, "eta is 1.5"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"steps": 0}, "1 to 40"),
        ({"steps": 41}, "1 to 40"),
        ({"steps": 40}, "fewer steps"),  # times 1 … 40 of a network that knows 0 … 39
        ({"steps": 0, "kind": "dpm_solver"}, "1 to 40"),
    ],
)
def test_nonsense_is_one_sentence(options, says):
    with pytest.raises(UserError, match=says):
        sampler(**options)
