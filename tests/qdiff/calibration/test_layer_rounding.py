"""Rounding a layer of a unit: its own grids, slices and groups, on the inputs of both networks."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from qdiff.calibration import layer_rounding
from qdiff.calibration.column_rounding import Grid, Target, round_matrix
from qdiff.calibration.input_moments import InputMoments
from qdiff.calibration.layer_rounding import ColumnRounding, round_layer, round_layers, rounding_bytes
from qdiff.calibration.reconstruction import Unit
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.interface import split_input
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

KINDS = {
    "linear": (lambda: nn.Linear(8, 6), (40, 8)),
    "conv": (lambda: nn.Conv2d(8, 6, 3, stride=2, padding=1), (40, 8, 5, 5)),
    "groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), (40, 8, 5, 5)),
    "split": (lambda: split_input(nn.Conv2d(8, 6, 3), 3), (40, 8, 5, 5)),
}


def layer_and_inputs(kind, bits=4, act_bits=None):
    torch.manual_seed(0)
    made, shape = KINDS[kind]
    layer = QuantModule(made().double(), QuantConfig(bits, act_bits, split_shortcut=True)).double()
    layer.init_weight_ranges("max")
    layer.requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64)
    x = x + 0.7 * x.roll(1, 1)
    return layer, x, 0.9 * x + 0.2 * torch.randn_like(x)


def unit_of(layer, x, quantized):
    return Unit("unit", layer, (quantized,), layer(x), (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_those_of_each_group_on_its_grid(kind, walker):
    layer, x, quantized = layer_and_inputs(kind)
    moments = InputMoments(layer, len(x))
    moments.add(x, quantized)
    nearest = layer.weight_int.clone()
    parts = list(zip(layer.weight_quantizers, layer.weight_slices(), strict=True))
    deltas = torch.cat([q.delta.expand_as(part) for q, part in parts], dim=1)
    zeros = torch.cat([q.zero_point.expand_as(part) for q, part in parts], dim=1)
    round_layers(unit_of(layer, x, quantized), walker, ColumnRounding(most_rows=None), activations=False)
    groups = len(moments.inputs)
    for g in range(groups):
        rows = slice(g * 6 // groups, (g + 1) * 6 // groups)
        grid = Grid(deltas[rows].flatten(1), zeros[rows].flatten(1), 4)
        expected = round_matrix(
            layer.weight[rows].flatten(1), grid, moments.inputs[g], moments.cross[g], target=Target.CORRECTED
        )
        assert torch.equal(layer.weight_int[rows].flatten(1).double(), expected)
    assert not torch.equal(layer.weight_int, nearest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_nearer_to_the_float_one(kind, walker):
    layer, x, quantized = layer_and_inputs(kind, bits=3)
    unit = unit_of(layer, x, quantized)

    def error():
        with leaf_modes([layer], weights=True, activations=False):
            return float((layer(quantized) - unit.target).square().mean())

    nearest = error()
    round_layers(unit, walker, ColumnRounding(), activations=False)
    assert error() < 0.8 * nearest


def test_inputs_that_are_not_finite_are_an_error():
    layer, x, quantized = layer_and_inputs("linear")
    moments = InputMoments(layer, len(x))
    moments.add(x, quantized / 0)
    with pytest.raises(UserError, match=r"the inputs of a\.b are not finite on the calibration set; check the float"):
        round_layer("a.b", layer, moments, ColumnRounding())


def test_what_cannot_be_factored_stays_nearest_with_a_warning(monkeypatch, caplog):
    layer, x, quantized = layer_and_inputs("linear")
    nearest, moments = layer.weight_int.clone(), InputMoments(layer, len(x))
    moments.add(x, quantized)

    def fails(*_, **__):
        raise layer_rounding.NotPositiveDefinite("no factor")

    monkeypatch.setattr(layer_rounding, "round_matrix", fails)
    with caplog.at_level(logging.WARNING, logger="qdiff"):
        round_layer("a.b", layer, moments, ColumnRounding())
    assert torch.equal(layer.weight_int, nearest)
    assert "a.b keeps its rounding to nearest: no factor" in caplog.text


def test_memory_is_bounded_by_the_largest_layer():
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    found = rounding_bytes(QuantModel(network, QuantConfig(4)))
    assert 14 * 36**2 * 8 < found < 14 * 36**2 * 8 + (1 << 29)
    assert rounding_bytes(QuantModel(nn.Sequential(nn.Conv2d(4, 8, 3)), QuantConfig(None, 8))) < found


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"target": "best"}, "--gptq_target"),
        ({"factor": -1.0}, "--gptq_factor"),
        ({"factor": float("nan")}, "--gptq_factor"),
        ({"factor": 1.0, "target": "plain"}, "--gptq_factor"),
        ({"damping": 0.0}, "--gptq_damping"),
        ({"damping": float("inf")}, "--gptq_damping"),
        ({"most_rows": 0}, "--gptq_rows"),
    ],
)
def test_numbers_out_of_range_name_the_option(values, option):
    with pytest.raises(UserError, match=option) as caught:
        ColumnRounding(**values)
    assert "\n" not in str(caught.value)
