"""Ranges: min-max by its formula, the search against a plain loop, observers over several batches."""

from __future__ import annotations

import pytest
import torch

from qdiff.functional import fake_quantize_inference
from qdiff.ranges.estimators import ESTIMATORS, RangeMethod, estimate
from qdiff.ranges.least_error import LeastError
from qdiff.ranges.qparams import TINY, qparams

# Relative, of a step size: one float32 division and one multiplication in another order.
DELTA_TOLERANCE = 1e-6


def close(delta, expected):
    return abs(float(delta) - expected) <= DELTA_TOLERANCE * expected


def test_asymmetric_min_max():
    delta, zero_point = estimate(torch.tensor([-1.0, 0.5, 2.0]), 4, RangeMethod.MIN_MAX, symmetric=False)
    assert close(delta, 3 / 15) and not close(delta * 1.01, 3 / 15)
    assert int(zero_point) == 5 and zero_point.dtype == torch.int32


def test_symmetric_min_max():
    delta, zero_point = estimate(torch.tensor([-1.0, 0.5, 2.8]), 4, RangeMethod.MIN_MAX, symmetric=True)
    assert close(delta, 2.8 / 7) and not close(delta * 1.01, 2.8 / 7)
    assert int(zero_point) == 8


def test_unsigned_starts_at_zero_and_uses_all_levels():
    delta, zero_point = estimate(torch.tensor([0.0, 0.9]), 8, RangeMethod.MIN_MAX, symmetric=True, unsigned=True)
    assert close(delta, 0.9 / 255) and int(zero_point) == 0


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", list(ESTIMATORS))
@pytest.mark.parametrize("values", [[5.0, 6.0, 7.0], [-7.0, -6.0, -5.0]])
def test_zero_is_in_the_range_of_one_sided_input(values, method, symmetric):
    x = torch.tensor(values)
    delta, zero_point = estimate(x, 8, method, symmetric)
    y = fake_quantize_inference(x, delta, zero_point, 8)
    assert (y - x).abs().max() <= delta, "a value was clamped away"
    assert len(set(y.tolist())) == 3
    assert fake_quantize_inference(torch.zeros(()), delta, zero_point, 8) == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_zero_has_a_positive_step(symmetric):
    delta, _ = estimate(torch.zeros(5), 8, RangeMethod.MSE, symmetric)
    assert float(delta) == pytest.approx(TINY)


def test_one_bit_symmetric_has_finite_step():
    delta, zero_point = qparams(torch.tensor(-2.0), torch.tensor(1.0), 1, symmetric=True)
    assert float(delta) == 2.0 and int(zero_point) == 1


def test_channels_are_independent():
    x = (
        torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 10, 100, 1000])[:, None, None, None]
    )
    for method in ESTIMATORS:
        delta, zero_point = estimate(x, 4, method, symmetric=False, per_channel=True)
        assert delta.shape == zero_point.shape == (4, 1, 1, 1)
        for row in range(4):
            alone_delta, alone_zero = estimate(x[row], 4, method, symmetric=False)
            assert delta[row] == alone_delta and zero_point[row] == alone_zero


def searched(values: list[float], bits: int, symmetric: bool) -> tuple[float, int]:
    """The search in double precision Python: 80 shrink steps of 1 %, least mean |error|^2.4."""
    low, high, top = min(*values, 0.0), max(*values, 0.0), 2**bits - 1
    best = (float("inf"), 0.0, 0)
    for step in range(80):
        a, b = low * (1 - 0.01 * step), high * (1 - 0.01 * step)
        if symmetric:
            delta, zero = max(-a, b) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
        else:
            delta = (b - a) / top
            zero = min(max(round(-a / delta), 0), top)
        errors = [abs((min(max(round(v / delta) + zero, 0), top) - zero) * delta - v) ** 2.4 for v in values]
        best = min(best, (sum(errors) / len(errors), delta, zero))
    return best[1:]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_search_matches_a_plain_loop(bits, symmetric):
    # A heavy tail, so that clipping pays and the best range is not the first.
    x = torch.randn(300, generator=torch.Generator().manual_seed(bits)) ** 3
    delta, zero_point = estimate(x, bits, RangeMethod.MSE, symmetric)
    expected, expected_zero = searched(x.tolist(), bits, symmetric)
    assert close(delta, expected) and not close(delta * 1.01, expected)
    assert int(zero_point) == expected_zero
    if bits <= 4:
        assert delta < estimate(x, bits, RangeMethod.MIN_MAX, symmetric)[0]


def observed(batches, method=RangeMethod.MIN_MAX, momentum=None, symmetric=False, unsigned=False, bits=8):
    observer = ESTIMATORS[method](momentum)
    for batch in batches:
        observer.update(batch)
    return observer.qparams(bits, symmetric, unsigned)


def test_observer_takes_the_extremes_of_all_batches():
    batches = [torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 4.0]), torch.tensor([-2.0, 0.0])]
    assert observed(batches) == estimate(torch.cat(batches), 8, RangeMethod.MIN_MAX, symmetric=False)


@pytest.mark.parametrize("method", list(ESTIMATORS))
def test_an_observer_knows_the_extremes_so_far(method):
    """Sensitivities read them to tell whether a layer was called; ``ema`` cuts a batch of more than 16 samples."""
    observer = ESTIMATORS[method](None)
    assert observer.low is None and observer.high is None
    batches = [torch.linspace(-1.0, 4.0, 20), torch.tensor([-2.0, 0.0]), torch.zeros(3)]
    for batch in batches:
        observer.update(batch)
    assert (float(observer.low), float(observer.high)) == (-2.0, 4.0)
    assert observer.low.shape == observer.high.shape == ()


def test_observer_averages_exponentially():
    delta, _ = observed([torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0]), torch.tensor([0.0, 5.0])], momentum=0.5)
    assert close(delta, (0.5 * (0.5 * 1 + 0.5 * 3) + 0.5 * 5) / 255)


def test_observer_search_equals_the_search_on_everything():
    x = torch.randn(400, generator=torch.Generator().manual_seed(3)) ** 3
    extremes = torch.stack([x.min(), x.max()])  # the observer adds them to its sample
    wanted = estimate(torch.cat([x, extremes]), 4, RangeMethod.MSE, symmetric=True)
    assert observed([x[:150], x[150:]], RangeMethod.MSE, symmetric=True, bits=4) == wanted


def test_observer_sample_is_bounded_and_meets_every_column(monkeypatch):
    """A stride that divides the image's width would look at one column only."""
    monkeypatch.setattr(LeastError, "SAMPLE", 1 << 10)
    observer = LeastError()
    columns = torch.arange(32.0).expand(8, 16, 32, 32)
    for _ in range(8):
        observer.update(columns)
    kept = torch.cat(observer.kept)
    assert set(kept.unique().tolist()) == set(range(32))
    assert kept.numel() <= 8 * LeastError.SAMPLE
    delta, zero_point = observer.qparams(8, symmetric=False, unsigned=False)
    assert delta > 0 and int(zero_point) == 0
