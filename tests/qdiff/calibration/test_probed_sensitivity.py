"""Sensitivities from random projections: exact on a linear network, and close to those measured layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qdiff.calibration.probed_sensitivity import probed_sensitivities
from qdiff.calibration.sensitivity import SQNR_CAP, Operand, OutputQuality, layer_sensitivity, sqnr
from qdiff.config import QuantConfig
from qdiff.wrapping import layer_places

W4A8 = QuantConfig(4, 8, split_shortcut=True)
WEIGHTS, ACTS = Operand.WEIGHTS, Operand.ACTIVATIONS
NAMES = ["conv_in", "up.0.block.0.nin_shortcut", "mid.block_1.conv2", "down.0.block.0.conv1"]
EXACT = 1e-6  # dB, in float64
# dB of an estimate from 128 projections: squares of normal numbers have a deviation of √(2 / 128), and noise is one.
SPREAD = 2.0


def probed(network, inputs, widths, names=None, batch_size=8, config=W4A8, seed=3):
    names = list(layer_places(network)) if names is None else names
    given = {operand: names if widths.get(operand) else [] for operand in Operand}
    generator = torch.Generator().manual_seed(seed)
    return probed_sensitivities(
        network, given, {o: widths.get(o, ()) for o in Operand}, config, inputs, batch_size, generator
    )


class Chain(nn.Module):
    """Two layers and nothing between them, so that the first order is all."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.two(self.one(x))


def test_a_linear_network_in_float64():
    torch.manual_seed(0)
    network, x = Chain().double(), torch.randn(6, 5).double()
    found = probed(network, (x,), {WEIGHTS: (3,), ACTS: (4,)}, batch_size=4)
    with torch.no_grad():
        out = network(x)
        generator = torch.Generator().manual_seed(3)
        projections = torch.cat([torch.randn(4, 3, generator=generator), torch.randn(2, 3, generator=generator)])
        gradient = {"two": projections.double(), "one": projections.double() @ network.two.weight}
        for operand, bits in ((WEIGHTS, 3), (ACTS, 4)):
            for name, values in (("one", x), ("two", network.one(x))):
                layer = getattr(network, name)
                noise = noise_of(layer, values, operand, bits)
                products = (gradient[name] * noise).sum(1)
                expected = sqnr(float(out.square().sum()), float(products.square().sum()))
                assert abs(found[operand][name][bits] - expected) < EXACT
                planted = sqnr(float(out.square().sum()), float((products * 1.00001).square().sum()))
                assert abs(found[operand][name][bits] - planted) > EXACT


def noise_of(layer, values, operand, bits):
    """The error of a layer's output, rounded by hand; ranges are float32."""
    levels = 2**bits - 1
    if operand is WEIGHTS:
        low, high = (layer.weight.amin(1, keepdim=True).clamp(max=0), layer.weight.amax(1, keepdim=True).clamp(min=0))
        tensor = layer.weight
    else:
        low, high, tensor = values.min().clamp(max=0), values.max().clamp(min=0), values
    delta = ((high - low) / levels).float().double()
    zero = torch.round(-low / delta)
    rounded = (((tensor / delta).round() + zero).clamp(0, levels) - zero) * delta
    noise = rounded - tensor
    return values @ noise.T if operand is WEIGHTS else noise @ layer.weight.T


@pytest.mark.slow
@pytest.mark.parametrize("operand", Operand)
def test_it_is_close_to_what_is_measured_layer_by_layer(operand, tiny_network):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(128, 1, 8, 8, generator=generator), torch.arange(128) * 7
    found = probed(tiny_network, inputs, {operand: (6, 8)}, NAMES[:2], batch_size=64)[operand]
    quality = OutputQuality(tiny_network, inputs, 64)
    for name in NAMES[:2]:
        expected = layer_sensitivity(tiny_network, name, W4A8, operand, (6, 8), quality)
        for bits, value in expected.items():
            assert abs(found[name][bits] - value) < SPREAD, (name, bits, found[name], expected)
        assert found[name][8] - found[name][6] > 2 * SPREAD  # a planted other width is seen


def test_the_network_is_as_before(tiny_network, held_out, state_of):
    next(tiny_network.parameters()).requires_grad_(False)
    before = state_of(tiny_network)
    probed(tiny_network, held_out, {WEIGHTS: (4,), ACTS: (8,)})
    after = state_of(tiny_network)
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1:] == after[1:] and all(grad is None for _, grad in after[2])
    with pytest.raises(ZeroDivisionError):
        tiny_network.conv_out.register_forward_hook(lambda *_: 1 / 0)
        probed(tiny_network, held_out, {WEIGHTS: (4,)})
    assert state_of(tiny_network)[2] == before[2]


class Uneven(nn.Module):
    """A layer used twice, one that is never called, one without any effect, and one whose samples do not come first."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([self.one])
        self.unused, self.silent, self.turned = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.checkpointed = checkpointed

    def middle(self, x):
        return self.turned(x.transpose(0, 1)).transpose(0, 1)

    def forward(self, x):
        x = self.one(self.blocks[0](x))
        middle = (
            self.middle
            if self.checkpointed is False
            else lambda y: checkpoint(self.middle, y, use_reentrant=self.checkpointed == "reentrant")
        )
        return middle(x) + 0 * self.silent(x)


@pytest.fixture
def uneven():
    torch.manual_seed(0)
    return Uneven(), torch.randn(2, 300, 4).transpose(0, 1).contiguous()


@pytest.mark.parametrize("operand", Operand)
def test_layers_that_are_shared_unused_or_without_effect(operand, uneven):
    network, x = uneven
    found = probed(network, (x,), {operand: (6,)}, batch_size=10)[operand]
    assert found["unused"] is None and found["silent"] == {6: SQNR_CAP}
    quality = OutputQuality(network, (x,), 10)
    expected = layer_sensitivity(network, "one", W4A8, operand, (6,), quality)[6]
    assert abs(found["one"][6] - expected) < SPREAD
    turned = layer_sensitivity(network, "turned", W4A8, operand, (6,), quality)[6]
    assert abs(found["turned"][6] - turned) < 2 * SPREAD  # one projection per batch


@pytest.mark.parametrize("kind", ["reentrant", "new"])
def test_checkpointed_parts_count_once(kind, uneven):
    network, x = uneven
    expected = probed(network, (x,), {WEIGHTS: (4,), ACTS: (6,)})
    network = copy.deepcopy(network)
    network.checkpointed = kind
    assert probed(network, (x,), {WEIGHTS: (4,), ACTS: (6,)}) == expected


@pytest.mark.slow
def test_dynamic_ranges_and_ranges_per_timestep(tiny_network, held_out):
    for changes in ({"act_dynamic": True}, {"act_ranges": "timestep"}):
        found = probed(tiny_network, held_out, {ACTS: (4, 8)}, config=QuantConfig(4, 8, **changes))[ACTS]
        assert all(found[name][4] < found[name][8] - 10 for name in NAMES), changes


class InPlace(nn.Module):
    """What a layer takes is changed behind it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.one(x)
        z = self.two(y)
        y.add_(1)
        return y + z


def test_an_input_that_is_changed_in_place_is_no_wrong_number():
    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match=r"changed in place|an inplace operation"):
        probed(InPlace(), (torch.randn(6, 4),), {ACTS: (6,)})
