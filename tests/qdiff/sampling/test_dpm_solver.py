"""DPM-Solver++: order of convergence on problems with a known solution, and the number of evaluations."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from qdiff.errors import UserError
from qdiff.sampling import DiffusionSchedule, sample_dpm_solver
from qdiff.sampling import dpm_solver as module

N = 40
FIRST, REST = 0.5, 0.1875  # β_0 and all later β, exact in binary: log α_t is then linear in t on [1/N, 1]
SCHEDULE = DiffusionSchedule(torch.tensor([FIRST] + [REST] * (N - 1)))
X_T = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
ORDER_TOLERANCE = 0.3  # of an observed order of convergence


def alpha_sigma(n: float) -> tuple[float, float]:
    """α and σ at the network's (fractional) time n."""
    bar = (1 - FIRST) * (1 - REST) ** n
    return bar**0.5, (1 - bar) ** 0.5


def half_log_snr(n: float) -> float:
    a, s = alpha_sigma(n)
    return log(a / s)


MEAN, VARIANCE = 0.7, 0.25  # of Gaussian data


def gaussian_eps(x, t):
    a, s = alpha_sigma(float(t[0]))
    return s * (x - a * MEAN) / (a**2 * VARIANCE + s**2)


def gaussian_solution():
    """The probability-flow ODE keeps (x_t − α_t μ)/√(α_t² v + σ_t²) constant."""
    (a_T, s_T), (a_0, s_0) = alpha_sigma(N - 1), alpha_sigma(0)
    scale = ((a_0**2 * VARIANCE + s_0**2) / (a_T**2 * VARIANCE + s_T**2)) ** 0.5
    return a_0 * MEAN + scale * (X_T - a_T * MEAN)


def flat_start_eps(x, t):
    """Data prediction (λ_t − λ_T)⁴ whatever x is: flat at the start."""
    a, s = alpha_sigma(float(t[0]))
    return (x - a * (half_log_snr(float(t[0])) - half_log_snr(N - 1)) ** 4) / s


def flat_start_solution():
    """x_0/σ_0 = x_T/σ_T + ∫ e^λ (λ − λ_T)⁴ dλ (Lu et al. 2022, DPM-Solver++, proposition 4.1)."""
    (_, s_T), (_, s_0) = alpha_sigma(N - 1), alpha_sigma(0)
    u = half_log_snr(0) - half_log_snr(N - 1)
    integral = exp(u) * (u**4 - 4 * u**3 + 12 * u**2 - 24 * u + 24) - 24
    return s_0 * (X_T / s_T + exp(half_log_snr(N - 1)) * integral)


GAUSSIAN = (gaussian_eps, gaussian_solution())
FLAT_START = (flat_start_eps, flat_start_solution())


def observed_order(problem, counts=(80, 160), **options) -> float:
    eps, exact = problem
    errors = [float((sample_dpm_solver(eps, X_T, SCHEDULE, n, **options) - exact).norm()) for n in counts]
    return log(errors[0] / errors[1]) / log(counts[1] / counts[0])


@pytest.mark.parametrize(
    ("method", "order", "problem", "counts"),
    [
        ("singlestep", 1, GAUSSIAN, (80, 160)),
        ("singlestep", 2, GAUSSIAN, (80, 160)),
        # 3k + 2 evaluations: the other counts end with a step of order 1, which caps the global order at 2
        ("singlestep", 3, GAUSSIAN, (161, 323)),
        ("multistep", 1, GAUSSIAN, (80, 160)),
        ("multistep", 2, GAUSSIAN, (80, 160)),
        # the published start with a step of order 1 also caps it at 2, unless the solution is flat there
        ("multistep", 3, FLAT_START, (80, 160)),
    ],
)
def test_order_of_convergence(method, order, problem, counts):
    assert abs(observed_order(problem, counts, method=method, order=order) - order) < ORDER_TOLERANCE


@pytest.mark.parametrize(("order", "problem"), [(2, GAUSSIAN), (3, FLAT_START)])
def test_order_test_catches_a_planted_multistep_error(monkeypatch, order, problem):
    """An update that overlooks its oldest prediction is one order lower, and seen to be."""
    real = module._multistep
    monkeypatch.setattr(module, "_multistep", lambda x, history, t: real(x, history[: order - 1], t))
    assert abs(observed_order(problem, order=order) - order) > 2 * ORDER_TOLERANCE


@pytest.mark.parametrize(("order", "counts"), [(2, (80, 160)), (3, (161, 323))])
def test_order_test_catches_a_planted_singlestep_error(monkeypatch, order, counts):
    """Data predictions that are 1 % off at the intermediate times cost the step its order."""
    real = module._singlestep

    def planted(x, s, t, d0, k, clock, data_prediction):
        return real(x, s, t, d0, k, clock, lambda x, p: 1.01 * data_prediction(x, p))

    monkeypatch.setattr(module, "_singlestep", planted)
    assert abs(observed_order(GAUSSIAN, counts, method="singlestep", order=order) - order) > 2 * ORDER_TOLERANCE


@pytest.mark.parametrize("method", ["singlestep", "multistep"])
def test_higher_orders_are_closer_at_equal_cost(method):
    eps, exact = GAUSSIAN
    runs = [sample_dpm_solver(eps, X_T, SCHEDULE, 50, order=k, method=method) for k in (1, 2, 3)]
    errors = [float((x - exact).norm()) for x in runs]
    assert errors[0] > 3 * errors[1] > 3 * errors[2]


@pytest.mark.parametrize("method", ["singlestep", "multistep"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_steps_is_the_number_of_evaluations(method, order):
    for steps in range(1, 20):
        times = []

        def eps(x, t, times=times):
            times.append(float(t[0]))
            return gaussian_eps(x, t)

        sample_dpm_solver(eps, X_T, SCHEDULE, steps, order=order, method=method)
        assert len(times) == steps
        assert times[0] == N - 1 and times == sorted(times, reverse=True) and times[-1] > 0


def test_singlestep_groups():
    assert module.singlestep_orders(9, 3) == [3, 3, 2, 1]
    assert module.singlestep_orders(10, 3) == [3, 3, 3, 1]
    assert module.singlestep_orders(11, 3) == [3, 3, 3, 2]
    assert module.singlestep_orders(5, 2) == [2, 2, 1]
    assert module.singlestep_orders(3, 1) == [1, 1, 1]


def test_time_and_lambda_are_inverse():
    schedule = DiffusionSchedule(torch.linspace(1e-4, 0.02, 1000))
    clock = module.ContinuousSchedule(schedule)
    for time in (0.001, 0.0123, 0.5, 0.9999, 1.0):
        point = clock.at_time(time)
        assert clock.at_lambda(point.lam).time == pytest.approx(time, rel=1e-9)
        assert point.alpha**2 + point.sigma**2 == pytest.approx(1.0)
    # training time n is (n + 1)/T
    assert clock.at_time(0.301).alpha ** 2 == pytest.approx(float(schedule.alphas_cumprod[300]))
    assert clock.network_time(clock.at_time(0.301)) == pytest.approx(300)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 10, "order": 4}, "1, 2 or 3"),
        ({"steps": 10, "method": "adaptive"}, "singlestep or multistep"),
        ({"steps": 10, "schedule": DiffusionSchedule(torch.tensor([0.5, 1.0]))}, "ᾱ is 0"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(UserError, match=says):
        sample_dpm_solver(gaussian_eps, X_T, **{"schedule": SCHEDULE, **options})
