"""DPM-Solver++: high-order solvers of the probability-flow ODE, on the network's clean-image prediction.

Symbols (Lu et al. 2022, arXiv 2211.01095): x_t = α_t x_0 + σ_t ε, λ_t = log(α_t/σ_t), h = λ_t − λ_s the step
from time s to t, D the data predictions. α_t² is ᾱ_t of DDPM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from math import exp, expm1, log, sqrt

import numpy as np
import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.sampling.interface import NoisePrediction, OnStep
from qdiff.sampling.schedule import DiffusionSchedule

LOWER_ORDER_BELOW = 15
"""`lower_order_final` applies only to runs with fewer steps than this, as in the published latent sampler
(the solver's own repository later lowered it to 10)."""


class SolverMethod(str, Enum):
    """Where the k data predictions of a step of order k come from."""

    SINGLESTEP = "singlestep"  # from k − 1 intermediate times within the step
    MULTISTEP = "multistep"  # from the steps before it


@dataclass(frozen=True)
class Point:
    """A continuous time, and the schedule's values at it."""

    time: float
    alpha: float
    sigma: float
    lam: float


class ContinuousSchedule:
    """The discrete schedule as functions of continuous time: training time n is (n + 1)/T in [1/T, 1].

    log α is interpolated linearly in time, and time linearly in log α. All values are float64, whatever the dtype of x.

    Raises:
        UserError: ᾱ reaches 0, where λ is −∞.

    Source: Lu et al. 2022, "DPM-Solver", appendix D.3 (discrete-time schedules).
    """

    def __init__(self, schedule: DiffusionSchedule) -> None:
        bars = schedule.alphas_cumprod.numpy()
        if bars[-1] <= 0.0:
            raise UserError("DPM-Solver cannot start where ᾱ is 0; use DDIM with this beta_schedule")
        self.num_train = schedule.num_train
        self._times = np.arange(1, self.num_train + 1) / self.num_train
        self._log_alphas = 0.5 * np.log(bars)

    def at_time(self, time: float) -> Point:
        """The schedule at a time in [1/T, 1]."""
        log_alpha = float(np.interp(time, self._times, self._log_alphas))
        sigma = sqrt(-expm1(2.0 * log_alpha))
        return Point(float(time), exp(log_alpha), sigma, log_alpha - log(sigma))

    def at_lambda(self, lam: float) -> Point:
        """The schedule where log(α/σ) is ``lam``."""
        log_alpha = -0.5 * np.logaddexp(0.0, -2.0 * lam)
        return self.at_time(np.interp(log_alpha, self._log_alphas[::-1], self._times[::-1]))

    def network_time(self, point: Point) -> float:
        """(t − 1/T)·T: the network's timestep at this point, not always a whole number."""
        return self.num_train * point.time - 1.0


def singlestep_orders(steps: int, order: int) -> list[int]:
    """Return the orders of the singlestep groups; they sum to ``steps`` network evaluations.

    Order 3 takes K = ⌊steps/3⌋ + 1 groups: 3, …, 3 and then (2, 1), (1) or (2) ("DPM-Solver-fast"). Order 2
    takes pairs, and ends with a single one if ``steps`` is odd.

    Source: Lu et al. 2022, "DPM-Solver", appendix D.2 and its released code.
    """
    if order == 3:
        tail = {0: [2, 1], 1: [1], 2: [2]}[steps % 3]
        return [3] * (steps // 3 + 1 - len(tail)) + tail
    return [order] * (steps // order) + [1] * (steps % order)


def sample_dpm_solver(
    eps: NoisePrediction,
    x_T: Tensor,
    schedule: DiffusionSchedule,
    steps: int,
    *,
    order: int = 2,
    method: SolverMethod | str = SolverMethod.MULTISTEP,
    lower_order_final: bool = True,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with DPM-Solver++ on time-uniform steps from t = 1 to t = 1/T.

    The result is x at training time 0, so noise of size σ_0 is left in it, as published.

    Args:
        eps: the network, called exactly ``steps`` times, with t float32 [N] in [0, T − 1] (float64 if x_T
            is).
        x_T: starting noise [N, C, H, W]; the result keeps its device and dtype.
        schedule: ᾱ_t of the network's training.
        steps: number of network evaluations, at least 1.
        order: 1 (DDIM), 2 or 3. Multistep starts with orders 1, 2, … as published, so in the limit the first step's
            small error of order h² dominates order 3.
        method: ``multistep`` or ``singlestep``.
        lower_order_final: let multistep end with lower orders, for stability, if it has fewer than `LOWER_ORDER_BELOW`
            steps.
        on_step: see `qdiff.sampling.interface`; one call per group of evaluations, with a float t.

    Returns:
        The final sample, [N, C, H, W].

    Raises:
        UserError: the order is not 1, 2 or 3, the method is unknown, steps < 1, or ᾱ = 0 at the schedule's end.

    Source: Lu et al. 2022, "DPM-Solver++", algorithms 1 and 2; its released code for order 3 (multistep
    corrected, see `_multistep`).
    """
    try:
        method = SolverMethod(method)
    except ValueError:
        raise UserError(f"the DPM-Solver method is {method!r}; choose singlestep or multistep") from None
    if order not in (1, 2, 3):
        raise UserError(f"the DPM-Solver order is {order}; choose 1, 2 or 3")
    if steps < 1:
        raise UserError(f"{steps} sampling steps were requested; give at least 1")
    clock = ContinuousSchedule(schedule)
    grid = [clock.at_time(t) for t in np.linspace(1.0, 1.0 / clock.num_train, steps + 1)]
    if method is SolverMethod.MULTISTEP:
        final = steps if lower_order_final and steps < LOWER_ORDER_BELOW else steps + order
        orders = [min(order, i + 1, final - i) for i in range(steps)]
        ends = range(1, steps + 1)
    else:
        orders = singlestep_orders(steps, order)
        ends = np.cumsum(orders).tolist()

    def data_prediction(x: Tensor, p: Point) -> Tensor:
        """x_θ = (x − σ ε_θ)/α."""
        # at least float32: half precision has too few bits for a fractional time
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = torch.full((len(x),), clock.network_time(p), dtype=dtype, device=x.device)
        return (x - p.sigma * eps(x, t)) / p.alpha

    x, s = x_T, grid[0]
    history: list[tuple[Point, Tensor]] = []  # (time, D at that time), latest first; only multistep uses it
    plan = list(zip(ends, orders, strict=True))
    with torch.no_grad():
        for i, (end, k) in enumerate(plan):
            t = grid[end]
            d = data_prediction(x, s)
            if method is SolverMethod.MULTISTEP:
                history = [(s, d), *history[: order - 1]]
                x = _multistep(x, history[:k], t)
            else:
                x = _singlestep(x, s, t, d, k, clock, data_prediction)
            if on_step:
                on_step(i, clock.network_time(s), x, d)
            s = t
    return x


def _first_order(x: Tensor, s: Point, t: Point, d: Tensor) -> Tensor:
    """x_t = (σ_t/σ_s) x_s − α_t (e^{−h} − 1) D: exact if the data prediction is D throughout the step."""
    return (t.sigma / s.sigma) * x - (t.alpha * expm1(s.lam - t.lam)) * d


def _multistep(x: Tensor, history: list[tuple[Point, Tensor]], t: Point) -> Tensor:
    """Step to ``t`` with the order of ``history`` (1 to 3 pairs of time and prediction, latest first)."""
    (s, d0), *earlier = history
    if not earlier:
        return _first_order(x, s, t, d0)
    h = t.lam - s.lam
    (s1, d1), *earlier = earlier
    r0 = (s.lam - s1.lam) / h
    slope0 = (d0 - d1) / r0
    if not earlier:  # 2M, algorithm 2
        return _first_order(x, s, t, d0 + 0.5 * slope0)
    ((s2, d2),) = earlier
    r1 = (s1.lam - s2.lam) / h
    slope1 = (d1 - d2) / r1
    # 3M: derivatives at s, with respect to λ in units of h, of the parabola through the three predictions. The second
    # is twice the divided difference; the released code omits the factor 2, so its "order 3" converges as h².
    difference = (slope0 - slope1) / (r0 + r1)
    slope, curvature = slope0 + r0 * difference, 2.0 * difference
    phi2 = expm1(-h) / h + 1.0
    phi3 = phi2 / h - 0.5
    return _first_order(x, s, t, d0) + (t.alpha * phi2) * slope - (t.alpha * phi3) * curvature


def _singlestep(
    x: Tensor,
    s: Point,
    t: Point,
    d0: Tensor,
    order: int,
    clock: ContinuousSchedule,
    data_prediction: Callable[[Tensor, Point], Tensor],
) -> Tensor:
    """Step from ``s`` to ``t``, with order − 1 more evaluations, equally spaced in λ, between them."""
    if order == 1:
        return _first_order(x, s, t, d0)
    h = t.lam - s.lam
    m1 = clock.at_lambda(s.lam + h / order)
    d1 = data_prediction(_first_order(x, s, m1, d0), m1)
    if order == 2:  # 2S, algorithm 1 with r = 1/2: only the midpoint's prediction remains in the sum
        return _first_order(x, s, t, d1)
    m2 = clock.at_lambda(s.lam + h * 2 / 3)
    h2 = m2.lam - s.lam
    x2 = _first_order(x, s, m2, d0) + (m2.alpha * (expm1(-h2) / h2 + 1.0) * 2.0) * (d1 - d0)  # r2/r1 = 2
    d2 = data_prediction(x2, m2)
    return _first_order(x, s, t, d0) + (t.alpha * (expm1(-h) / h + 1.0) * 1.5) * (d2 - d0)  # 1/r2 = 1.5
