"""EDA-DM's range search: published values, trying every pair, edges, and the average over batches."""

from __future__ import annotations

import pytest
import torch
from golden_cases import GOLDEN
from torch.nn.functional import silu

from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.functional import fake_quantize_inference
from qdiff.ranges.estimators import RangeMethod, estimate
from qdiff.ranges.grid_search import GridSearch
from qdiff.ranges.qparams import TINY, affine
from qdiff.ranges.search import Side, search_range

# Relative, of step sizes and dequantized values: a rounding or two in float32.
DELTA_TOLERANCE = 1e-6
# Relative, of the least mean error: rounding δ to float32 moves it by half of this …
ERROR_TOLERANCE = 1e-4
# … and absolute, in units of width^2.4: float32's error in what is represented exactly.
EXACT_TOLERANCE = 1e-15


@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN / "eda_dm" / "golden.pth", weights_only=True)


def agrees(x, bits, found, wanted):
    """Whether δ, z and what they make of x are the published ones."""
    restored = fake_quantize_inference(x, *found, bits)
    pairs = (found[0], wanted["delta"]), (restored, wanted["dequant"])
    return torch.equal(found[1].float(), wanted["zero_point"]) and all(
        torch.allclose(a, b, rtol=DELTA_TOLERANCE, atol=0) for a, b in pairs
    )


@pytest.mark.parametrize("mode", ["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_match_the_published_values(golden, bits, mode):
    x, wanted = golden["W"], golden[f"w{bits}_{mode}"]
    delta, zero_point = estimate(x, bits, RangeMethod.SEARCH, mode == "sym", per_channel=True)
    assert agrees(x, bits, (delta, zero_point), wanted)
    assert not agrees(x, bits, (delta * (1 + 10 * DELTA_TOLERANCE), zero_point), wanted)
    assert not agrees(x, bits, (delta, zero_point + 1), wanted)
    assert not agrees(x, bits, estimate(x, bits, RangeMethod.SEARCH, mode != "sym", per_channel=True), wanted)


def averaged(batches, bits, symmetric=False, unsigned=False, momentum=None):
    observer = GridSearch(momentum)
    for batch in batches:
        observer.update(batch)
    return observer.qparams(bits, symmetric, unsigned)


@pytest.mark.parametrize("data", ["pos", "signed"])
@pytest.mark.parametrize("mode", ["sym", "asym"])
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_match_the_published_values(golden, bits, mode, data):
    """Also where the second batch lies on both sides of 0 and the first does not."""
    wanted = golden[f"a{bits}_{mode}_{data}"]
    first, second = golden["Apos" if data == "pos" else "Asig"], golden["A2"]
    assert agrees(first, bits, averaged([first], bits, mode == "sym"), wanted["after_first"])
    found = averaged([first, second], bits, mode == "sym", momentum=0.5)  # --running_stat's: not this method's
    assert agrees(second, bits, found, wanted["after_second"])
    for planted in ([second, first], [first, second, second], [first]):
        assert not agrees(second, bits, averaged(planted, bits, mode == "sym"), wanted["after_second"])


def every_error(rows, bits):
    """Mean |error|^2.4 in double precision of each width and zero point, [C, 100·2^b], straight from the definition."""
    rows = rows.double()
    width = rows.amax(1).clamp(min=0) - rows.amin(1).clamp(max=0)
    delta = (width[:, None] * torch.arange(1, 101) / 100 / (2**bits - 1)).clamp(min=TINY)  # [C, 100]
    zeros = torch.arange(2**bits)
    errors = []
    for x, d in zip(rows, delta, strict=True):
        levels = torch.round(x / d[:, None])  # [100, n]
        q = (levels[:, None] + zeros[:, None]).clamp(0, 2**bits - 1) - zeros[:, None]
        errors.append(((q * d[:, None, None] - x).abs() ** 2.4).mean(dim=2).flatten())
    return torch.stack(errors), width


def error_of(rows, found, bits):
    delta, zero_point = (v.double()[:, None] for v in found)
    return ((fake_quantize_inference(rows.double(), delta, zero_point, bits) - rows).abs() ** 2.4).mean(dim=1)


def near_best(rows, found, bits):
    """Whether no pair has a smaller error than the one that was found, for each row."""
    errors, width = every_error(rows, bits)
    step = (found[0] * (2**bits - 1) / width * 100).round().clamp(1, 100).nan_to_num(1)
    error = errors.gather(1, ((step - 1) * 2**bits + found[1]).long()[:, None])[:, 0]
    return error <= errors.amin(dim=1) * (1 + ERROR_TOLERANCE) + EXACT_TOLERANCE * width**2.4


def families(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(3, n, generator=generator)
    outlier = x.clone()
    outlier[:, n // 2] = 60
    rare = x * (torch.rand(3, n, generator=generator) > 0.9)
    rows = [x, x**3, x + 1.5, silu(2 * x), outlier, -1e-3 * outlier, (3 * x).round() / 3, rare, x * 1e4]
    return torch.cat(rows)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "n"), [(2, 1), (2, 40), (3, 300), (4, 2), (4, 700), (5, 40), (8, 5), (8, 60)])
def test_no_pair_of_width_and_zero_point_is_better(bits, n):
    rows = families(n)
    found = affine(*search_range(rows, bits, False, Side.BOTH), bits)
    assert near_best(rows, found, bits).all()
    if n > 2:
        # The next width and the next zero point are beyond the tolerance (but where every value is 0).
        planted = near_best(rows, (found[0] * 0.985, found[1]), bits)
        assert planted.float().mean() < 0.2
        planted = near_best(rows, (found[0], torch.where(found[1] > 0, found[1] - 1, 1)), bits)
        assert planted.float().mean() < 0.2


@pytest.mark.slow
def test_no_pair_is_better_on_a_whole_row_of_weights():
    """With so many values that some share an entry of the prefix sums."""
    rows = torch.randn(1, 4608, generator=torch.Generator().manual_seed(0))
    assert near_best(rows, affine(*search_range(rows, 6, False, Side.BOTH), 6), 6).all()


def test_thresholds_match_a_plain_loop():
    x = torch.randn(300, generator=torch.Generator().manual_seed(1)) ** 3
    for values, symmetric, (below, above) in ((x, True, (1, 1)), (x.abs(), False, (0, 1)), (-x.abs(), False, (1, 0))):
        found = estimate(values, 4, RangeMethod.SEARCH, symmetric)
        tried = []
        for i in range(1, 101):
            t = values.abs().max() * i / 100
            tried.append([float(v) for v in affine(-t * below, t * above, 4)])
        errors = [float(error_of(values[None], torch.tensor(pair)[:, None], 4)) for pair in tried]
        best = min(range(100), key=errors.__getitem__)
        assert float(found[0]) == pytest.approx(tried[best][0], rel=DELTA_TOLERANCE)
        assert float(found[0]) != pytest.approx(tried[best - 1][0], rel=DELTA_TOLERANCE)
        assert best < 99, "clipping pays on a heavy tail"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 12, 16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("values", [[0.0] * 5, [3.0] * 5, [-3.0] * 5, [2.0], [-1e-3], [0.0, 0.0, 1.0], [-1.0, 3.0]])
def test_edges(values, symmetric, bits):
    x = torch.tensor(values)
    delta, zero_point = estimate(x, bits, RangeMethod.SEARCH, symmetric)
    assert delta >= TINY and 0 <= int(zero_point) < 2**bits and delta.shape == zero_point.shape == ()
    assert zero_point.dtype == torch.int32
    assert fake_quantize_inference(torch.zeros(()), delta, zero_point, bits) == 0
    assert (fake_quantize_inference(x, delta, zero_point, bits) - x).abs().max() <= delta


def test_one_sided_16_bits_and_softmax_start_at_zero():
    x = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    for symmetric in (False, True):
        for found in (
            estimate(x, 16, RangeMethod.SEARCH, symmetric, unsigned=True),
            averaged([x, x], 16, symmetric, unsigned=True),
        ):
            assert int(found[1]) == 0
            assert float(found[0]) == pytest.approx(float(x.max()) / 65535, rel=DELTA_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [9, 10])
def test_zero_points_from_coarse_to_fine(bits):
    """Beyond 8 bits not every zero point is tried; here they still can be."""
    rows = families(12)
    found = affine(*search_range(rows, bits, False, Side.BOTH), bits)
    assert near_best(rows, found, bits).all()


@pytest.mark.parametrize("shift", [0.1, 0.2, 0.3, 0.4])
def test_the_zero_point_is_refined_where_clipping_pays(shift):
    """Where both ends are clipped no extreme aligns it, and 256 zero points of 1024 are too few."""
    x = torch.randn(1, 1 << 17, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    x[0, :2] = torch.tensor([-8.0, 8.0])
    x += shift
    delta, zero_point = affine(*search_range(x, 10, False, Side.BOTH), 10)
    assert delta < 0.995 * 16 / 1023
    errors = [float(error_of(x, (delta, zero_point + i), 10)) for i in range(-6, 7)]
    assert errors[6] <= min(errors) * (1 + ERROR_TOLERANCE)


@pytest.mark.parametrize("shift", [0.0, 2.0, -30.0])
def test_16_bits_on_both_sides_lose_no_value(shift):
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0)) + shift
    x = torch.cat([x, torch.tensor([-0.5, 0.5])])
    found = estimate(x, 16, RangeMethod.SEARCH, symmetric=False)
    plain = estimate(x, 16, RangeMethod.MIN_MAX, symmetric=False)
    one = [tuple(v[None] for v in pair) for pair in (found, plain)]
    assert error_of(x[None], one[0], 16) <= error_of(x[None], one[1], 16) * (1 + ERROR_TOLERANCE)
    assert (fake_quantize_inference(x, *found, 16) - x).abs().max() <= found[0] * 1.5


def test_channels_are_independent():
    x = torch.randn(40, 6, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 40).view(
        -1, 1, 1, 1
    )
    delta, zero_point = estimate(x, 4, RangeMethod.SEARCH, symmetric=False, per_channel=True)
    for i in range(40):
        alone = estimate(x[i], 4, RangeMethod.SEARCH, symmetric=False)
        assert delta[i].item() == alone[0].item() and zero_point[i].item() == alone[1].item()


def test_a_channel_far_from_zero_is_not_clipped_away():
    x = torch.tensor([[-1.0, 1.0, 0.5], [5.0, 5.5, 6.0], [-7.0, -7.0, -7.0]])
    found = estimate(x, 8, RangeMethod.SEARCH, symmetric=False, per_channel=True)
    assert ((fake_quantize_inference(x, *found, 8) - x).abs() <= found[0]).all()


def test_batches_are_sampled_with_their_extremes(monkeypatch):
    monkeypatch.setattr(GridSearch, "BATCH_SAMPLE", 1 << 10)
    x = torch.zeros(4, 8, 32, 32)
    x[1, 2, 3, 5], x[0, 0, 0, 1] = 9.0, -4.0
    observer = GridSearch()
    for _ in range(3):
        observer.update(x.half())
    assert len(observer.batches) == 3
    assert all(b.numel() <= 2 * (1 << 10) and (b.min(), b.max()) == (-4, 9) for b in observer.batches)
    delta, zero_point = observer.qparams(8, symmetric=False, unsigned=False)
    assert float(delta) == pytest.approx(13 / 255, rel=0.05) and delta.dtype == torch.float32 and int(zero_point) > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_a_user_error(bad):
    with pytest.raises(UserError, match="NaN or infinite"):
        estimate(torch.tensor([1.0, -1.0, bad]), 8, RangeMethod.SEARCH, symmetric=False)


def test_the_config_carries_the_method():
    config = QuantConfig(weight_range="search", act_range="search")
    assert config.act_range == RangeMethod.SEARCH and QuantConfig.from_dict(config.to_dict()) == config
