"""PTQD's and D²-DPM's fits against independent computations in numpy's float64, and against planted errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qdiff.calibration.noise_pairs import NoisePairs
from qdiff.calibration.noise_regression import (
    Kind,
    Per,
    correction_error,
    fit_correction,
    fit_d2,
    fit_ptqd,
)

CLOSE = 1e-9  # relative; rounding gives 1e-13


@pytest.fixture
def pair():
    """ε̂ and ε of 6 samples with 3 channels: correlated with both, other means per channel, and two outliers."""
    torch.manual_seed(0)
    exact = torch.randn(6, 3, 8, 8)
    error = 0.05 * exact + 0.1 * torch.randn_like(exact) + torch.tensor([0.02, -0.03, 0.1]).view(3, 1, 1)
    error[0, 0, 0, 0], error[3, 2, 1, 1] = 5.0, -7.0
    return exact + error, exact


def wanted_d2(quantized, exact, limit=4.0):
    """Least squares by numpy on elements that are no outliers: scale, shift and what remains."""
    x, y = quantized.ravel(), (quantized - exact).ravel()
    kept = np.abs(y - y.mean()) <= limit * y.std()
    slope, intercept = np.polyfit(x[kept], y[kept], 1)
    return 1 - slope, -intercept, (y[kept] - slope * x[kept] - intercept).std()


@pytest.mark.parametrize("per", Per)
def test_d2(pair, per):
    quantized, exact = (side.double().numpy() for side in pair)
    groups = [slice(None)] if per is Per.TENSOR else [[c] for c in range(3)]
    wanted = np.array([wanted_d2(quantized[:, g], exact[:, g]) for g in groups]).T
    found = torch.stack(fit_d2(*pair, per)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=CLOSE)
    with_outliers = np.array([wanted_d2(quantized[:, g], exact[:, g], np.inf) for g in groups]).T
    assert np.abs(found / with_outliers - 1).max() > 1e4 * CLOSE


@pytest.mark.parametrize("per", Per)
def test_ptqd(pair, per):
    quantized, exact = (side.double().numpy() for side in pair)
    d = quantized - exact
    k, _ = np.polyfit(exact.ravel(), d.ravel(), 1)
    rest = d - k * exact
    mu = rest.mean(axis=(0, 2, 3))
    std = rest.std(axis=(1, 2, 3)).mean() if per is Per.TENSOR else rest.std(axis=(2, 3)).mean(axis=0)
    found = [table.numpy() for table in fit_ptqd(*pair, per)]
    ones = np.ones(3)
    for table, wanted in zip(found, (ones / (1 + k), -mu / (1 + k), ones * std / (1 + k)), strict=True):
        np.testing.assert_allclose(table, wanted, rtol=CLOSE)
    assert abs(found[0][0] * (1 + 1.001 * k) - 1) > 1e3 * CLOSE


@pytest.mark.parametrize("per", Per)
def test_d2_without_correlation_is_the_mean(per):
    """D takes both signs equally often at each value of ε̂, so it tells nothing but its mean."""
    torch.manual_seed(0)
    quantized = torch.randn(8, 2, 4, 4).double()
    quantized = torch.cat([quantized, quantized])
    sign = torch.cat([torch.ones(8, 2, 4, 4), -torch.ones(8, 2, 4, 4)]).double()
    error = 0.25 + 0.5 * sign
    fit = fit_d2(quantized, quantized - error, per)
    groups = 1 if per is Per.TENSOR else 2
    torch.testing.assert_close(fit.scale, torch.ones(groups).double())
    torch.testing.assert_close(fit.shift, torch.full((groups,), -0.25).double())
    torch.testing.assert_close(fit.error_std, torch.full((groups,), 0.5).double())
    tilted = fit_d2(quantized, quantized - error - 0.01 * quantized, per)
    assert float((tilted.scale - 1).abs().min()) > 5e-3


def test_d2_contains_the_mean_of_ptqd():
    """Where D does not depend on ε, both subtract its mean, for the channels together or one by one."""
    torch.manual_seed(0)
    exact = torch.randn(8, 2, 4, 4).double()
    error = torch.tensor([0.1, -0.2]).double().view(2, 1, 1).expand_as(exact)
    d2, ptqd = fit_d2(exact + error, exact, Per.CHANNEL), fit_ptqd(exact + error, exact)
    torch.testing.assert_close(d2.scale * exact[0, :, 0, 0] + d2.shift, exact[0, :, 0, 0] - error[0, :, 0, 0])
    # PTQD's k is one number for all channels, so their different means leave a little of it.
    assert float((ptqd.shift + error[0, :, 0, 0]).abs().max()) < 0.01


@pytest.mark.parametrize("kind", Kind)
def test_an_affine_error_is_undone(kind):
    torch.manual_seed(0)
    exact = torch.randn(16, 1, 8, 8)
    pairs = NoisePairs((5.0, 1.0), [exact, exact], [1.1 * exact + 0.3, exact])
    fitted = fit_correction(kind, Per.TENSOR, pairs)
    assert fitted.times == (5.0, 1.0) and fitted.scale.shape == (2, 1)
    # D² keeps 1 − 0.9999 of the regression, as published.
    assert correction_error(fitted, pairs) < 1e-7 < 0.01 < correction_error(None, pairs)
    torch.testing.assert_close(fitted.scale[1], torch.ones(1).double())
    assert float(fitted.error_std[1]) == 0.0


def test_a_negative_slope_is_no_slope_in_ptqd():
    torch.manual_seed(0)
    exact = torch.randn(16, 1, 8, 8)
    shrunk = 0.8 * exact + 0.3
    assert float(fit_ptqd(shrunk, exact).scale) == 1.0
    assert float(fit_d2(shrunk, exact).scale) == pytest.approx(1.25, rel=1e-3)


@pytest.mark.parametrize("kind", Kind)
def test_a_constant_output(kind):
    zeros = torch.zeros(4, 2, 3, 3)
    fitted = fit_correction(kind, Per.CHANNEL, NoisePairs((0.0,), [zeros], [zeros + 0.5]))
    torch.testing.assert_close(fitted.shift, torch.full((1, 2), -0.5).double())
    assert fitted.scale.tolist() == [[1.0, 1.0]] and fitted.error_std.tolist() == [[0.0, 0.0]]


def test_the_error_of_a_correction(pair):
    pairs = NoisePairs((2.0, 1.0), [pair[1], pair[1]], [pair[0], pair[0]])
    plain = float((pair[0].double() - pair[1].double()).square().mean())
    assert correction_error(None, pairs) == pytest.approx(plain, rel=1e-12)
    fitted = fit_correction(Kind.D2, Per.CHANNEL, pairs)
    by_hand = fitted.scale[0].view(3, 1, 1) * pair[0].double() + fitted.shift[0].view(3, 1, 1) - pair[1].double()
    assert correction_error(fitted, pairs) == pytest.approx(float(by_hand.square().mean()), rel=1e-12)
