"""PLMS: golden values, an independent reference in float64, and what it has in common with the other samplers.

The golden file (described in `test_samplers`) has PLMS only with guidance; without it, the reference of this file,
which is itself checked against the golden samples, stands in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qdiff.errors import UserError
from qdiff.sampling import (
    DiffusionSchedule,
    make_beta_schedule,
    plms_calls,
    sample_generalized,
    sample_plms,
    select_timesteps,
)
from qdiff.sampling import plms as module

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "samplers.pth", weights_only=True)
GOLDEN_TOLERANCE = 1e-5  # relative L2; float32 rounding gives below 1e-6
EXACT_TOLERANCE = 1e-12  # relative L2 in float64

STABLE = DiffusionSchedule(make_beta_schedule("scaled_linear", 0.00085, 0.012, 1000))
FIRST_BAR = float(STABLE.alphas_cumprod[0])
X_T = GOLDEN["x_T"]
SCALE = 7.5
LENGTHS = [1, 2, 3, 5]


def closed_form(x, t, c, sin):
    return 0.6 * x + 0.3 * sin(x + t / 250) + 0.1 * c


def guided(x, t, scale, sin=torch.sin):
    """ε with classifier-free guidance, of torch tensors or numpy arrays; scale 0 means no condition at all."""
    if scale == 0:
        return closed_form(x, t, 0.0, sin)
    cond, uncond = (GOLDEN[key][: len(x)].view(-1, 1, 1, 1) for key in ("cond", "uncond"))
    cond, uncond = (c.double().numpy() if isinstance(x, np.ndarray) else c.to(x) for c in (cond, uncond))
    e_u, e_c = closed_form(x, t, uncond, sin), closed_form(x, t, cond, sin)
    return e_u + scale * (e_c - e_u)


def eps_of(scale):
    return lambda x, t: guided(x, t.to(x.dtype).view(-1, 1, 1, 1), scale)


def uniform(steps):
    return select_timesteps("uniform", steps, 1000, offset=1)


def spaced(length):
    """Timesteps of the given length, the same distance apart."""
    return [1 + 180 * k for k in range(length)]


def relative_error(out, expected):
    out, expected = torch.as_tensor(out).double().cpu(), torch.as_tensor(expected).double()
    return float((out - expected).norm() / expected.norm())


# --- the reference, in float64 numpy ---


def adams_bashforth(order):
    """∫₀¹ of the Lagrange polynomials on the nodes 0, −1, …, 1 − order."""
    weights = []
    for j in range(order):
        basis = np.polynomial.Polynomial([1.0])
        for k in set(range(order)) - {j}:
            basis *= np.polynomial.Polynomial([k, 1.0]) / (k - j)
        weights.append(basis.integ()(1.0))
    return np.array(weights)


def transfer(x, e, a, b):
    """The transfer part of Liu et al. 2022, from ᾱ = a to b: no x_0 in between, unlike the sampler's form."""
    coefficient = (b - a) / (a**0.5 * (((1 - b) * a) ** 0.5 + ((1 - a) * b) ** 0.5))
    return (b / a) ** 0.5 * x - coefficient * e


def reference(eps, x, timesteps, final_bar):
    """Every state that PLMS reaches, from ``eps(x, t)`` on numpy arrays."""
    # DiffusionSchedule keeps betas as float32, as the networks were trained
    betas = (np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).astype(np.float32)
    bars = np.cumprod(1 - betas.astype(np.float64))
    predictions, states = [], []
    for n in reversed(range(len(timesteps))):
        a = bars[timesteps[n]]
        b = bars[timesteps[n - 1]] if n > 0 else final_bar
        predictions.append(eps(x, timesteps[n]))
        if len(predictions) == 1:
            ahead = eps(transfer(x, predictions[0], a, b), timesteps[max(n - 1, 0)])
            e = (predictions[0] + ahead) / 2
        else:
            order = min(4, len(predictions))
            e = np.tensordot(adams_bashforth(order), np.stack(predictions[: -order - 1 : -1]), 1)
        x = transfer(x, e, a, b)
        states.append(x)
    return states


def sampler_states(eps, x_T, timesteps, **options):
    states = []
    sample_plms(eps, x_T, STABLE, timesteps, on_step=lambda i, t, x, x0: states.append(x), **options)
    return states


def reference_error(timesteps, scale=0.0, final_bar=FIRST_BAR):
    """The worst relative error of a state of the run, in float64."""
    x_T = X_T.double()
    states = sampler_states(eps_of(scale), x_T, timesteps, final_alpha_bar=final_bar)
    expected = reference(lambda x, t: guided(x, t, scale, np.sin), x_T.numpy(), timesteps, final_bar)
    return max(relative_error(*pair) for pair in zip(states, expected, strict=True))


def plms_error(steps, *, scale=SCALE, shift=0, final_alpha_bar=FIRST_BAR, device="cpu"):
    """Relative error against the golden sample, with an optional planted mistake."""
    timesteps = [t + shift for t in uniform(steps)]
    out = sample_plms(eps_of(scale), X_T.to(device), STABLE, timesteps, final_alpha_bar=final_alpha_bar)
    return relative_error(out, GOLDEN[f"ldm_plms_{steps}_cfg7.5"])


# --- golden ---


@pytest.mark.parametrize("steps", [20, 50])
def test_golden(steps):
    assert plms_error(steps) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("steps", [20, 50])
def test_the_reference_is_golden(steps):
    out = reference(lambda x, t: guided(x, t, SCALE, np.sin), X_T.double().numpy(), uniform(steps), FIRST_BAR)[-1]
    assert relative_error(out, GOLDEN[f"ldm_plms_{steps}_cfg7.5"]) < GOLDEN_TOLERANCE


@pytest.mark.parametrize("steps", [20, 50])
def test_golden_tolerance_catches_planted_errors(steps):
    assert plms_error(steps, shift=1) > 10 * GOLDEN_TOLERANCE
    assert plms_error(steps, scale=SCALE * 1.01) > 10 * GOLDEN_TOLERANCE
    assert plms_error(steps, final_alpha_bar=1.0) > 10 * GOLDEN_TOLERANCE
    ddim = sample_generalized(eps_of(SCALE), X_T, STABLE, uniform(steps), final_alpha_bar=FIRST_BAR)
    assert relative_error(ddim, GOLDEN[f"ldm_plms_{steps}_cfg7.5"]) > 10 * GOLDEN_TOLERANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_golden_on_cuda():
    for steps in (20, 50):
        assert plms_error(steps, device="cuda") < GOLDEN_TOLERANCE


# --- the method ---


@pytest.mark.parametrize("scale", [0.0, SCALE], ids=["unguided", "guided"])
@pytest.mark.parametrize("length", [*LENGTHS, 20, 50])
def test_every_state_is_that_of_the_reference(length, scale):
    timesteps = spaced(length) if length in LENGTHS else uniform(length)
    assert reference_error(timesteps, scale) < EXACT_TOLERANCE
    assert reference_error(timesteps, scale, final_bar=1.0) < EXACT_TOLERANCE


def test_repeated_timesteps_agree_with_the_reference():
    timesteps = select_timesteps("quad", 100, 1000)
    assert timesteps[:3] == [0, 0, 0]
    assert reference_error(timesteps) < EXACT_TOLERANCE


@pytest.mark.parametrize("order", [2, 3, 4])
def test_weights_are_those_of_adams_bashforth(order):
    np.testing.assert_allclose(module.ADAMS_BASHFORTH[order], adams_bashforth(order), rtol=1e-13)


@pytest.mark.parametrize("place", [(order, j) for order in (2, 3, 4) for j in range(order)], ids=str)
def test_tolerances_catch_a_planted_weight(monkeypatch, place):
    order, j = place
    weights = list(module.ADAMS_BASHFORTH[order])
    weights[j] *= 1.01
    monkeypatch.setitem(module.ADAMS_BASHFORTH, order, tuple(weights))
    assert reference_error(spaced(5)) > 1e6 * EXACT_TOLERANCE
    assert plms_error(20) > 10 * GOLDEN_TOLERANCE


@pytest.mark.parametrize("order", [2, 3])
def test_tolerances_catch_a_lower_order(monkeypatch, order):
    monkeypatch.setattr(module, "MAX_ORDER", order)
    assert reference_error(spaced(5)) > 1e6 * EXACT_TOLERANCE
    assert plms_error(20) > 10 * GOLDEN_TOLERANCE


def scripted_run(values, timesteps):
    """Run with a network that returns ``values[k]`` in call k: (calls, noise used by every step)."""
    calls, used = [], []

    def eps(x, t):
        calls.append((x, t))
        return torch.full_like(x, values[len(calls) - 1])

    bars = [float(STABLE.alphas_cumprod[t]) for t in timesteps]

    def on_step(i, t, x, x0):
        b = [FIRST_BAR, *bars[:-1]][::-1][i]
        used.append(float(((x - b**0.5 * x0) / (1 - b) ** 0.5).mean()))

    sample_plms(eps, X_T.double(), STABLE, timesteps, final_alpha_bar=FIRST_BAR, on_step=on_step)
    return calls, used


def test_every_step_combines_the_right_calls():
    """Powers of 100 keep apart what each call contributes; call 1 (the look ahead) is in no later step."""
    values = [100.0**k for k in range(6)]
    _, used = scripted_run(values, spaced(5))
    v = [values[0], *values[2:]]
    expected = [
        (values[0] + values[1]) / 2,
        (3 * v[1] - v[0]) / 2,
        (23 * v[2] - 16 * v[1] + 5 * v[0]) / 12,
        (55 * v[3] - 59 * v[2] + 37 * v[1] - 9 * v[0]) / 24,
        (55 * v[4] - 59 * v[3] + 37 * v[2] - 9 * v[1]) / 24,
    ]
    assert used == pytest.approx(expected, rel=1e-9)


def test_the_second_call_is_at_the_end_of_a_ddim_step():
    calls, _ = scripted_run([0.3, 0.0, 0.0, 0.0], spaced(3))
    x, t = calls[1]
    a, b = (float(STABLE.alphas_cumprod[t]) for t in (361, 181))
    assert relative_error(x, transfer(X_T.double(), 0.3, a, b)) < EXACT_TOLERANCE
    assert t.tolist() == [181, 181]


@pytest.mark.parametrize("length", [*LENGTHS, 20])
@pytest.mark.parametrize("final_bar", [1.0, FIRST_BAR])
def test_a_constant_noise_prediction_is_solved_exactly(length, final_bar):
    timesteps = uniform(20)[:length]
    x_T, noise = X_T.double(), torch.linspace(-1, 2, X_T[0].numel(), dtype=torch.float64).view_as(X_T[0])
    a = float(STABLE.alphas_cumprod[timesteps[-1]])
    x0 = (x_T - (1 - a) ** 0.5 * noise) / a**0.5
    solution = final_bar**0.5 * x0 + (1 - final_bar) ** 0.5 * noise

    def run(sampler, factor=1.0):
        # the factor makes the first call differ from the rest, which is what the tolerance has to see
        values = iter([factor])
        out = sampler(lambda x, t: noise * next(values, 1.0), x_T, STABLE, timesteps, final_alpha_bar=final_bar)
        return relative_error(out, solution)

    assert run(sample_generalized) < EXACT_TOLERANCE
    assert run(sample_plms) < EXACT_TOLERANCE
    assert run(sample_plms, factor=1.001) > 10 * EXACT_TOLERANCE


MEAN, VARIANCE = 0.7, 0.25  # of Gaussian data


def gaussian_eps(x, t):
    a = STABLE.alphas_cumprod[t].to(x.dtype).view(-1, 1, 1, 1)
    return (1 - a).sqrt() * (x - a.sqrt() * MEAN) / (a * VARIANCE + 1 - a)


def gaussian_error(sampler, steps):
    """Error of the sample where the probability-flow ODE has a known solution."""
    timesteps = uniform(steps)
    a = float(STABLE.alphas_cumprod[timesteps[-1]])
    scale = ((FIRST_BAR * VARIANCE + 1 - FIRST_BAR) / (a * VARIANCE + 1 - a)) ** 0.5
    solution = FIRST_BAR**0.5 * MEAN + scale * (X_T.double() - a**0.5 * MEAN)
    return relative_error(sampler(gaussian_eps, X_T.double(), STABLE, timesteps, final_alpha_bar=FIRST_BAR), solution)


@pytest.mark.parametrize("steps", [50, 100])
def test_much_closer_to_the_solution_than_ddim(steps, monkeypatch):
    ddim = gaussian_error(sample_generalized, steps)
    assert gaussian_error(sample_plms, steps) < 0.1 * ddim
    monkeypatch.setitem(module.ADAMS_BASHFORTH, 4, (55 / 24, -59 / 24, 37 / 24, -8 / 24))
    assert gaussian_error(sample_plms, steps) > 0.1 * ddim


# --- calls, callbacks, dtypes ---


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        ([500], [500, 500]),
        ([200, 500], [500, 200, 200]),
        ([100, 200, 500], [500, 200, 200, 100]),
        ([0, 100, 200, 300, 500], [500, 300, 300, 200, 100, 0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_calls_dtype_and_shape(timesteps, expected, dtype):
    times = []

    def eps(x, t):
        assert x.dtype == dtype and t.dtype == torch.int64 and t.shape == (2,) and not torch.is_grad_enabled()
        times.append(t)
        return 0.1 * x

    x_T = X_T.to(dtype)
    before = x_T.clone()
    out = sample_plms(eps, x_T, STABLE, timesteps)
    assert out.dtype == dtype and out.shape == x_T.shape and torch.equal(x_T, before)
    assert [t.tolist() for t in times] == [[t, t] for t in expected]
    assert len(times) == plms_calls(timesteps) == len(timesteps) + 1


@pytest.mark.parametrize("length", LENGTHS)
def test_on_step_sees_every_step(length):
    timesteps, seen = spaced(length), []
    out = sample_plms(eps_of(0), X_T, STABLE, timesteps, on_step=lambda *s: seen.append(s))
    assert [i for i, *_ in seen] == list(range(length))
    assert [t for _, t, *_ in seen] == timesteps[::-1]
    assert torch.equal(seen[-1][2], out)
    torch.testing.assert_close(seen[-1][3], out)  # the last step goes to ᾱ = 1, so it ends on the predicted image


def test_states_may_be_kept():
    kept, copies = [], []

    def on_step(i, t, x, x0):
        kept.extend((x, x0))
        copies.extend((x.clone(), x0.clone()))

    sample_plms(eps_of(0), X_T, STABLE, spaced(5), on_step=on_step)
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))


def test_no_gradients():
    x_T = X_T.clone().requires_grad_()
    assert not sample_plms(eps_of(0), x_T, STABLE, spaced(5)).requires_grad
    assert torch.is_grad_enabled()


def test_images_do_not_depend_on_the_batch():
    both = sample_plms(eps_of(SCALE), X_T, STABLE, spaced(5))
    torch.testing.assert_close(sample_plms(eps_of(SCALE), X_T[:1], STABLE, spaced(5)), both[:1])


def test_two_runs_are_equal():
    assert torch.equal(*(sample_plms(eps_of(SCALE), X_T, STABLE, spaced(5)) for _ in range(2)))


@pytest.mark.parametrize(
    ("timesteps", "options", "says"),
    [
        ([], {}, "ascending"),
        ([500, 200], {}, "ascending"),
        ([-1, 200], {}, "ascending"),
        ([200, 1000], {}, "ascending"),
        ([200, 500], {"final_alpha_bar": 1.5}, "final_alpha_bar"),
        ([200, 500], {"final_alpha_bar": 0.1}, "final_alpha_bar"),
    ],
)
def test_bad_input(timesteps, options, says):
    def eps(x, t):
        raise AssertionError("the network was called")

    with pytest.raises(UserError, match=says):
        sample_plms(eps, X_T, STABLE, timesteps, **options)


def test_calls_of_an_empty_run():
    with pytest.raises(UserError, match="at least 1"):
        plms_calls([])
