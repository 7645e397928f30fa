"""τ that is learned, against the formulas of DMQ's loop in float64, with gradients by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from qdiff.calibration.feeding import Feeding
from qdiff.calibration.input_scales import InputScaling, learned
from qdiff.calibration.reconstruction import random_batches
from qdiff.config import QuantConfig
from qdiff.quant_layer import QuantModule

EXACT = 1e-9  # relative, in float64; every planted error of the tests is beyond it
BITS, ACT_BITS = 4, 8
COUNT, TIMESTEPS, CHANNELS = 12, 3, 6
SETTINGS = InputScaling("learned", iterations=25, batch_size=8, lr=0.02, weighting=20.0)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return QuantModule(nn.Linear(CHANNELS, 4), QuantConfig(BITS, ACT_BITS)).double()


@pytest.fixture
def inputs():
    """Inputs [N, C] whose channel 2 is large, at timesteps of other sizes, and the timesteps."""
    entries = torch.arange(COUNT) % TIMESTEPS
    x = torch.randn(COUNT, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[:, 2] *= 20
    return x * (1 + 0.3 * entries)[:, None], entries


class Rounded:
    """Values on the grid of their extremes along some axes, and the gradient by them: straight through, and by δ."""

    def __init__(self, values, bits, axis, by_range):
        self.values, self.top, self.axis, self.by_range = values, 2**bits - 1, axis, by_range
        low, high = values.min(axis, keepdims=True), values.max(axis, keepdims=True)
        self.delta = (np.maximum(high, 0) - np.minimum(low, 0)) / self.top
        self.zero = np.round(-np.minimum(low, 0) / self.delta)
        levels = np.clip(np.round(values / self.delta) + self.zero, 0, self.top)
        self.result = self.delta * (levels - self.zero)
        # A batch may hold a sample twice: what sets a range together shares its gradient.
        at_low, at_high = values == low, values == high
        self.lowest = at_low * (low < 0) / at_low.sum(axis, keepdims=True)
        self.highest = at_high * (high > 0) / at_high.sum(axis, keepdims=True)

    def gradient(self, by_result):
        shifted = self.values / self.delta + self.zero
        inside = (shifted >= -0.5) & (shifted <= self.top + 0.5)
        # δ·(q − z) has the derivative (result − value)/δ by δ where it is not clamped, and q − z where it is.
        by_delta = np.where(inside, self.result - self.values, self.result) / self.delta
        by_delta = (by_result * by_delta).sum(self.axis, keepdims=True) / self.top
        return by_result * inside + self.by_range * by_delta * (self.highest - self.lowest)


class Plain:
    """Values that are not rounded."""

    def __init__(self, values, *_):
        self.result = values

    def gradient(self, by_result):
        return by_result


# What the reference does; a planted error is another value of one of them.
RECIPE = {
    **{"momentum": 0.95, "power": SETTINGS.weighting, "knows_batch": True, "sums": True, "by_range": True},
    **{"betas": (0.9, 0.999), "period": SETTINGS.iterations, "balances": True},
}
PLANTED = {
    "knows_batch": False,  # λ of the losses before this batch, 1 before there are any
    "momentum": 0.9,
    "power": 19.0,
    "sums": False,  # the mean of a timestep's losses in a batch
    "by_range": False,  # ranges are constants
    "betas": (0.9, 0.99),
    "period": SETTINGS.iterations + 1,
    "balances": False,
}


def reference(layer, inputs, start, **planted):
    """Return τ after the loop: errors of Q(x/τ)·Q(τ·W), weighted by λ, and Adam on log τ along a cosine."""
    recipe, (x, entries), weight = RECIPE | planted, (v.numpy() for v in inputs), layer.weight.detach().numpy()
    operand = Rounded if len(layer.act_quantizers) else Plain
    log_tau, running, moments, betas = np.log(start.numpy()), np.zeros(TIMESTEPS), [0.0, 0.0], recipe["betas"]
    for step, rows in enumerate(drawn()):
        tau, given, entry = np.exp(log_tau), x[rows], entries[rows]
        left = operand(given / tau, ACT_BITS, None, recipe["by_range"])
        right = Rounded(weight * tau, BITS, 1, recipe["by_range"])
        difference = left.result @ right.result.T - given @ weight.T
        losses, at = (difference**2).sum(1), np.arange(TIMESTEPS)[:, None] == entry
        before = running
        running = recipe["momentum"] * before + (1 - recipe["momentum"]) * (
            (at * losses).sum(1) / (1 if recipe["sums"] else np.maximum(at.sum(1), 1))
        )
        known = running if recipe["knows_batch"] else before
        factors = (1 - known / max(known.sum(), 1e-8)) ** recipe["power"]
        by_output = 2 * difference * factors[entry][:, None] / len(rows)
        by_tau = (left.gradient(by_output @ right.result) * -given / tau**2).sum(0)
        by_tau += (right.gradient(by_output.T @ left.result) * weight).sum(0)
        moments = [b * m + (1 - b) * (by_tau * tau) ** p for b, m, p in zip(betas, moments, (1, 2), strict=True)]
        first, second = (m / (1 - b ** (step + 1)) for b, m in zip(betas, moments, strict=True))
        rate = SETTINGS.lr * (1 + math.cos(math.pi * step / recipe["period"])) / 2
        log_tau = log_tau - rate * first / (np.sqrt(second) + 1e-8)
    return torch.from_numpy(np.exp(log_tau - (log_tau.mean() if recipe["balances"] else 0)))


def drawn():
    generator = torch.Generator().manual_seed(5)
    return random_batches(COUNT, SETTINGS.batch_size, SETTINGS.iterations, generator).numpy()


def found(layer, inputs, start, pass_size=SETTINGS.batch_size):
    generator, feeding = torch.Generator().manual_seed(5), Feeding(torch.device("cpu"), pass_size)
    return learned(layer, *inputs, start, SETTINGS, generator, feeding)


def furthest(tau, wanted):
    return float((tau / wanted - 1).abs().max())


@pytest.mark.parametrize("least", [1.0, 0.5], ids=["from 1", "from a scale"])
def test_tau_is_that_of_the_formulas(least, layer, inputs):
    start = torch.linspace(least, 1, CHANNELS, dtype=torch.float64)
    tau = found(layer, inputs, start)
    assert furthest(tau, start / start.log().mean().exp()) > 0.1
    assert furthest(tau, reference(layer, inputs, start)) < EXACT
    for name, value in PLANTED.items():
        assert furthest(tau, reference(layer, inputs, start, **{name: value})) > EXACT, name


def test_a_batch_in_parts_has_the_weights_of_the_whole(layer, inputs):
    """With inputs in float, since their range would be that of a part."""
    layer.act_quantizers = nn.ModuleList()
    start = torch.ones(CHANNELS, dtype=torch.float64)
    wanted = reference(layer, inputs, start)
    for pass_size in (8, 3):
        assert furthest(found(layer, inputs, start, pass_size), wanted) < EXACT
