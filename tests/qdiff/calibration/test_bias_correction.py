"""Bias correction: mean outputs become equal, and the float layer stays what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qdiff.calibration.bias_correction import correct_biases
from qdiff.calibration.observe import observe_unit
from qdiff.calibration.reconstruction import Unit
from qdiff.config import QuantConfig
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule

EXACT = 1e-9  # relative, in float64
KINDS = {
    "linear": (lambda: nn.Linear(8, 6), (9, 5, 8)),
    "conv": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), (9, 8, 5, 5)),
    "groups": (lambda: nn.Conv2d(8, 6, 3, groups=2, padding="same"), (9, 8, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3), (9, 8, 7)),
}


def made(kind, **config):
    torch.manual_seed(0)
    layer, shape = KINDS[kind]
    layer = QuantModule(layer().double(), QuantConfig(**{"weight_bits": 3, "act_bits": 4, **config})).double()
    if len(layer.weight_quantizers):
        layer.init_weight_ranges("max")
    layer.requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64) + 1
    return layer, Unit("unit", layer, (0.9 * x,), layer(x), (x,))


def mean(layer, output):
    return output.movedim(layer.channel_dim, -1).flatten(0, -2).mean(dim=0)


def means(layer, unit, activations):
    with leaf_modes([layer], weights=True, activations=activations):
        return mean(layer, layer(*unit.inputs)), mean(layer, unit.target)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("bits", [3, None])
def test_mean_outputs_become_equal(kind, activations, bits, walker):
    layer, unit = made(kind, weight_bits=bits)
    observe_unit(unit, walker, "max")
    found, expected = means(layer, unit, activations)
    assert (found - expected).norm() > 1e-3 * expected.norm()
    for _ in range(2):  # once more changes nothing
        correct_biases(unit, walker, activations)
        quantized = means(layer, unit, activations)[0] if bits or activations else None
        if quantized is not None:
            assert (quantized - expected).norm() <= EXACT * expected.norm()
            assert (quantized * (1 + 1e-8) - expected).norm() > EXACT * expected.norm()
        assert torch.equal(layer(*unit.float_inputs), unit.target), "the float layer has changed"


def test_a_layer_without_a_bias_stays(walker):
    layer, unit = made("linear")
    layer.bias = None
    correct_biases(unit, walker, activations=False)
    assert layer.bias is None and layer.float_bias is None


def test_layers_follow_one_another(walker):
    """The second layer corrects what its own inputs lack."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = made("conv1d")[0], made("linear")[0]

        def forward(self, x):
            return self.last(self.first(x).repeat(1, 1, 2)[..., :8].mT)

    module, (_, unit) = Two(), made("linear")
    with torch.no_grad():
        unit = Unit("unit", module, unit.inputs, module(*unit.float_inputs), unit.float_inputs)
        correct_biases(unit, walker, activations=False)
        with leaf_modes([module], weights=True, activations=False):
            output = module(*unit.inputs)
    expected = mean(module.last, unit.target)
    assert (mean(module.last, output) - expected).norm() <= EXACT * expected.norm()


def test_state_dicts_carry_both_biases(walker):
    layer, unit = made("conv")
    fresh = copy.deepcopy(layer)
    correct_biases(unit, walker, activations=False)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(*unit.float_inputs), unit.target)
    assert torch.equal(*(means(some, unit, False)[0] for some in (layer, fresh)))
    fresh.load_state_dict(made("conv")[0].state_dict())
    assert fresh.float_bias is None


def test_a_released_or_packed_layer_holds_one_bias(walker):
    for change in ("release_float_weight", "pack"):
        layer, unit = made("conv")
        correct_biases(unit, walker, activations=False)
        expected = means(layer, unit, False)[0]
        getattr(layer, change)()
        assert layer.float_bias is None and torch.equal(means(layer, unit, False)[0], expected)


@pytest.mark.parametrize("form", ["float", "release_float_weight"])
def test_a_layer_left_in_float_corrects_what_comes_to_it(form, walker):
    """Also where it holds one bias, as runtimes do; in the float network it has its own."""
    layer, unit = made("conv", weight_bits=None, act_bits=None)
    correct_biases(unit, walker, activations=True)
    assert torch.equal(layer(*unit.float_inputs), unit.target)
    if form != "float":
        getattr(layer, form)()
    for activations in (False, True):
        found, expected = means(layer, unit, activations)
        assert (found - expected).norm() <= EXACT * expected.norm()
    plain = mean(layer, made("conv", weight_bits=None, act_bits=None)[0](*unit.inputs))
    assert (plain - expected).norm() > 1e-3 * expected.norm()
