"""Inputs of a unit's layers in both networks: what each forward gives, how far it runs, and what is observed of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.calibration.input_moments import InputMoments
from qdiff.calibration.observe import observe_unit
from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.unit_inputs import UnitInputs
from qdiff.config import QuantConfig
from qdiff.interface import AttentionCore
from qdiff.modes import leaf_modes
from qdiff.quant_model import QuantModel
from qdiff.quantizer import calibrated_act_quantizers

SAMPLES = 40


class Block(nn.Module):
    """Two layers with attention between them; what follows a layer changes that layer's input in place."""

    def __init__(self):
        super().__init__()
        self.first, self.core, self.last = nn.Linear(8, 8), AttentionCore(), nn.Linear(8, 6)
        self.ends = 0

    def forward(self, x):
        y = self.first(x)
        heads = y.unsqueeze(1)
        y = self.core(heads, heads, heads).squeeze(1)
        out = self.last(y)
        y.mul_(0)
        self.ends += 1
        return out


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.between, self.ends = nn.Linear(8, 8), nn.Linear(8, 8), 0

    def forward(self, x):
        y = self.layer(self.between(self.layer(x)))
        self.ends += 1
        return y


def unit_of(module, act_bits=4):
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 5, 8, dtype=torch.float64)
    quantized = 0.9 * x + 0.1 * torch.randn_like(x)
    qnn = QuantModel(module.double(), QuantConfig(4, act_bits), example=None).double()
    for layer in qnn.layers().values():
        layer.init_weight_ranges("max")
    with torch.no_grad():
        return Unit("unit", qnn.model, (quantized,), qnn.model(x), (x,))


@pytest.fixture
def small(walker):
    """Batches that do not divide the samples."""
    return type(walker)(walker.storage, walker.device, 12)


def inputs_seen(unit, leaf, given, **modes):
    """What a leaf takes in one forward of all samples."""
    seen = []
    handle = leaf.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with leaf_modes([unit.module], **modes), torch.no_grad():
        unit.module(*given)
    handle.remove()
    return seen


@pytest.mark.parametrize("name", ["first", "last"])
def test_moments_are_those_of_both_forwards(name, small):
    unit = unit_of(Block())
    inputs = UnitInputs(unit, small, activations=True)
    for _, leaf in inputs.leaves:
        inputs.observe(leaf)
    layer = getattr(unit.module, name)
    (x,) = inputs_seen(unit, layer, unit.float_inputs, weights=False, activations=False)
    (x_hat,) = inputs_seen(unit, layer, unit.inputs, weights=True, activations=True)
    expected = InputMoments(layer, SAMPLES)
    expected.add(x, layer.act_quantizers[0](x_hat))
    found = inputs.moments(layer)
    for a, b in (
        (found.inputs, expected.inputs),
        (found.cross, expected.cross),
        *zip(found.means, expected.means, strict=True),
    ):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    unquantized = InputMoments(layer, SAMPLES)
    unquantized.add(x, x_hat)
    assert not torch.allclose(found.inputs, unquantized.inputs, rtol=1e-9)


def test_ranges_are_those_of_observing_the_unit_leaf_by_leaf(small):
    """With quantizers before a leaf settled, what it observes is what a run of the whole unit shows it."""
    unit = unit_of(Block())
    inputs = UnitInputs(unit, small, activations=True)
    assert [name for name, _ in inputs.leaves] == ["first", "core", "last"]
    for _, leaf in inputs.leaves:
        inputs.observe(leaf)
        first = next(iter(calibrated_act_quantizers(leaf).values()))
        (x, *_) = inputs_seen(unit, leaf, unit.inputs, weights=True, activations=True)
        assert float(first.delta) == pytest.approx(float(x.max() - x.min()) / 15, rel=1e-6)


def test_all_of_attention_is_observed(small):
    one, other = unit_of(Block()), unit_of(Block())
    inputs = UnitInputs(one, small, activations=True)
    inputs.observe(one.module.first)
    inputs.observe(one.module.core)
    observe_unit(other, small, "max")
    for operand in "qkvw":
        found = getattr(one.module.core, f"act_quantizer_{operand}")
        assert bool(found.initialised)
        # The other unit observed all at once, so its attention saw inputs of an unquantized first layer.
        expected = getattr(other.module.core, f"act_quantizer_{operand}")
        assert float(found.delta) == pytest.approx(float(expected.delta), rel=0.2)


def test_a_unit_runs_only_as_far_as_the_layer(small):
    unit = unit_of(Twice(), act_bits=None)
    unit.module.ends = 0
    inputs = UnitInputs(unit, small, activations=False)
    batches = -(-SAMPLES // 12)
    assert unit.module.ends == batches + 1  # the float network, once; and one sample for the order of the leaves
    assert inputs.repeats
    found = inputs.moments(unit.module.layer)
    assert unit.module.ends == batches + 1
    assert found.rows == 2 * SAMPLES * 5
    expected = InputMoments(unit.module.layer, SAMPLES)
    floats = inputs_seen(unit, unit.module.layer, unit.float_inputs, weights=False, activations=False)
    quants = inputs_seen(unit, unit.module.layer, unit.inputs, weights=True, activations=False)
    for x, x_hat in zip(floats, quants, strict=True):
        expected.add(x, x_hat)
    assert torch.allclose(found.inputs, expected.inputs, rtol=1e-9)


def test_inputs_follow_the_rounding_of_the_layers_before(small):
    unit = unit_of(Block(), act_bits=None)
    inputs = UnitInputs(unit, small, activations=False)
    before = inputs.moments(unit.module.last).inputs
    inputs.moments(unit.module.first)  # only the inputs of one layer are kept
    layer = unit.module.first
    layer.set_weight_int((layer.weight_int + 1).clamp(max=15))
    assert not torch.allclose(inputs.moments(unit.module.last).inputs, before)


def test_stored_inputs_are_in_the_storage_and_released(small):
    unit = unit_of(Block(), act_bits=None)
    before = small.storage.in_ram
    inputs = UnitInputs(unit, small, activations=False)
    floats = 2 * SAMPLES * 5 * 8 * 8  # two layers, float64
    assert small.storage.in_ram - before == floats
    inputs.moments(unit.module.first)
    inputs.moments(unit.module.last)
    assert small.storage.in_ram - before == floats * 3 // 2
    del inputs
    assert small.storage.in_ram == before


class Attention(nn.Module):
    """Queries and keys take the same tensor, values a copy of it, and the last layer its changed memory."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys, self.values, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        x = torch.tanh(x)
        y = self.queries(x) + self.keys(x) + self.values(x.clone())
        x.mul_(2)
        return y + self.last(x)


def test_layers_that_take_the_same_tensor_share_a_run(small):
    unit = unit_of(Attention())
    inputs = UnitInputs(unit, small, activations=True)
    batches, before = -(-SAMPLES // 12), unit.module.runs
    found = {}
    for name, leaf in inputs.leaves:
        inputs.observe(leaf)
        found[name] = inputs.moments(leaf)
    assert unit.module.runs - before == 3 * batches
    for name, moments in found.items():
        layer = getattr(unit.module, name)
        (x,) = inputs_seen(unit, layer, unit.float_inputs, weights=False, activations=False)
        (x_hat,) = inputs_seen(unit, layer, unit.inputs, weights=True, activations=True)
        expected = InputMoments(layer, SAMPLES)
        expected.add(x, layer.act_quantizers[0](x_hat))
        assert torch.allclose(moments.cross, expected.cross, rtol=1e-9, atol=1e-12)
