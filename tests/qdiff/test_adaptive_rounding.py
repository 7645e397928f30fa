"""Learned rounding: the stretched sigmoid, its start, its regulariser, and what remains of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.adaptive_rounding import MARGIN, LearnedRounding, around_integers
from qdiff.config import QuantConfig
from qdiff.interface import split_input
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.ranges.estimators import RangeMethod
from qdiff.weight_forms import WeightForm

# Absolute, in units of a step: the fraction of w/δ through a logarithm and a sigmoid in float32.
FRACTION_TOLERANCE = 1e-5


def make_layer(bits=4, symmetric=False, split=False):
    torch.manual_seed(0)
    config = QuantConfig(bits, weight_symmetric=symmetric, split_shortcut=split)
    module = QuantModule(split_input(nn.Conv2d(6, 4, 3), 2), config)
    module.init_weight_ranges(RangeMethod.MIN_MAX)
    return module.requires_grad_(False)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_starts_as_the_float_weight(symmetric, split):
    layer = make_layer(symmetric=symmetric, split=split)
    rounding = LearnedRounding(layer)
    weight = rounding.soft_weight()
    steps = (weight - layer.weight) / rounding.delta
    # Only an extreme that the rounded zero point leaves outside of the range is clamped.
    levels = layer.weight / rounding.delta + rounding.zero_point
    inside = (levels >= 0) & (levels <= 15)
    assert inside.float().mean() > 0.9
    assert steps[inside].abs().max() < FRACTION_TOLERANCE
    assert ((weight * 1.01 - layer.weight) / rounding.delta)[inside].abs().max() > FRACTION_TOLERANCE


def test_h_is_the_stretched_sigmoid():
    rounding = LearnedRounding(make_layer())
    with torch.no_grad():
        rounding.alpha.copy_(torch.linspace(-6, 6, rounding.alpha.numel()).reshape(rounding.alpha.shape))
    expected = (1.2 / (1 + torch.exp(-rounding.alpha)) - 0.1).clamp(0, 1)
    assert (rounding.h() - expected).abs().max() < FRACTION_TOLERANCE
    assert rounding.h().min() == 0 and rounding.h().max() == 1


@pytest.mark.parametrize("beta", [2.0, 20.0])
def test_regulariser_formula(beta):
    rounding = LearnedRounding(make_layer(split=True))
    rounding.alpha.requires_grad_(False)
    terms = [1 - abs(2 * h - 1) ** beta for h in rounding.h().flatten().tolist()]
    assert float(rounding.regulariser(beta)) == pytest.approx(sum(terms), rel=1e-5)  # float32 sum of 216 terms
    assert float(rounding.regulariser(beta * 1.01)) != pytest.approx(sum(terms), rel=1e-5)


def test_regulariser_vanishes_once_decided():
    rounding = LearnedRounding(make_layer())
    with torch.no_grad():
        rounding.alpha.copy_(rounding.alpha.sign() * 10)
    assert float(rounding.regulariser(2.0)) == 0


def test_hard_rounding_is_floor_or_floor_plus_one():
    layer = make_layer()
    rounding = LearnedRounding(layer)
    torch.manual_seed(1)
    with torch.no_grad():
        rounding.alpha.copy_(torch.randn_like(rounding.alpha))
        rounding.alpha.view(-1)[0] = 0.0  # an undecided one goes up
    rounding.harden()
    expected = torch.floor(layer.weight / rounding.delta) + (rounding.alpha >= 0) + rounding.zero_point
    assert torch.equal(layer.weight_int.float(), expected.clamp(0, 15))


@pytest.mark.parametrize("symmetric", [False, True])
def test_untouched_it_hardens_to_nearest(symmetric):
    layer = make_layer(symmetric=symmetric)
    nearest = layer.weight_int.clone()
    LearnedRounding(layer).harden()
    # h starts at the fraction, and α ≥ 0 means h ≥ ½.
    assert torch.equal(layer.weight_int, nearest)


def test_the_layer_uses_it_only_inside_the_block():
    layer, x = make_layer(), torch.ones(1, 6, 3, 3)
    hard = layer.dequantized_weight()
    with LearnedRounding(layer) as rounding, leaf_modes([layer], weights=True, activations=False):
        out = layer(x)
        assert torch.equal(out, layer.apply_weight(x, rounding.soft_weight(), layer.bias))
        out.sum().backward()
        assert rounding.alpha.grad is not None and rounding.alpha.grad.abs().sum() > 0
    assert layer.form is WeightForm.FLOAT
    with leaf_modes([layer], weights=True, activations=False):
        assert torch.equal(layer(x), layer.apply_weight(x, hard, layer.bias))


def test_the_block_ends_on_an_exception_too():
    layer = make_layer()
    with pytest.raises(ZeroDivisionError), LearnedRounding(layer):
        raise ZeroDivisionError
    assert layer.form is WeightForm.FLOAT


def test_nothing_of_it_enters_the_state():
    layer = make_layer()
    names = set(layer.state_dict())
    with LearnedRounding(layer):
        assert set(layer.state_dict()) == names


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_started_from_integers_it_hardens_to_them(symmetric, split):
    layer = make_layer(symmetric=symmetric, split=split)
    torch.manual_seed(2)
    moved = layer.weight_int.int() + torch.randint(-3, 4, layer.weight.shape)
    layer.set_weight_int(moved.clamp(0, 15))
    expected = layer.weight_int.clone()
    rounding = LearnedRounding(layer, from_integers=True)
    h = rounding.h().detach()
    assert h.min() > 0 - FRACTION_TOLERANCE and (h - 0.5).abs().min() >= MARGIN - FRACTION_TOLERANCE
    assert (rounding.base >= -rounding.zero_point).all() and (rounding.base + 1 <= 15 - rounding.zero_point).all()
    rounding.harden()
    assert torch.equal(layer.weight_int, expected)


def test_where_nearest_rounding_stayed_the_start_is_the_published_one():
    layer = make_layer()
    published, started = LearnedRounding(layer), LearnedRounding(layer, from_integers=True)
    inside = layer.weight / published.delta + published.zero_point
    inside = (inside > 0) & (inside < 15)
    far = (published.h() - 0.5).abs() >= MARGIN
    clear = inside & far & (published.h() >= 0) & (published.h() < 0.5)
    assert clear.sum() > 20
    assert torch.equal(published.alpha[clear], started.alpha[clear])


def test_candidates_around_integers():
    """Towards w/δ where the integer is beside it, and within the levels at their ends."""
    scaled, integers = torch.tensor([1.3, 1.3, 1.3, 1.45, 9.0, -9.0]), torch.tensor([3, 2, 0, 1, 3, 0])
    base, h = around_integers(scaled, integers, torch.tensor(0), 3)
    assert base.tolist() == [2, 1, 0, 1, 2, 0]
    # v = 1.3: r = 3 lies above its neighbour, r = 2 is farther than nearest, and r = 0 is two below.
    assert h.tolist() == pytest.approx([0.7, 0.7, 0.3, 0.3, 0.7, 0.3])
    _, kept = around_integers(torch.tensor([1.9]), torch.tensor([2]), torch.tensor(0), 3)
    assert kept.tolist() == pytest.approx([0.9])
