"""The widths of a network's layers, from sensitivities and mean widths."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest

from qdiff.calibration.mixed_precision import MixedPrecision, choose_widths, layers_to_measure
from qdiff.calibration.sensitivity import Operand
from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel
from qdiff.wrapping import layer_places

W4A8 = QuantConfig(4, 8)
IMAGE = (1, 8, 8)


@pytest.fixture
def chosen(tiny_network):
    """``chosen(quant, mixed)``: widths for sensitivities by which layers with few weights matter most.

    With ``positions``, it is layers whose weights are used at many positions.
    """
    macs = {cost.name: cost.macs for cost in account(tiny_network, IMAGE).layers}
    sizes = {n: p._modules[a].weight.numel() for n, [(p, a)] in layer_places(tiny_network).items()}

    def made(quant=W4A8, positions=False, **mixed):
        mixed = MixedPrecision(**mixed)
        better = {n: -3 * math.log2(macs[n] / sizes[n]) if positions else 0.001 * sizes[n] for n in sizes}
        found = {o: {n: {b: 6.0 * b + better[n] for b in mixed.widths(o)} for n in sizes} for o in Operand}
        return choose_widths(tiny_network, quant, mixed, found, macs)

    return made


def counted_layers(network, quant):
    """What the account says of the layers with a weight, and how many weights each has."""
    wrapped = QuantModel(copy.deepcopy(network), quant)
    layers = [c for c in account(wrapped, IMAGE).layers if c.kind in ("Conv2d", "Linear")]
    return layers, {n: m.weight.numel() for n, m in network.named_modules() if n in {c.name for c in layers}}


@pytest.mark.parametrize("asked", [{"target": 4.5}, {"act_target": 7}])
def test_what_is_chosen_is_what_is_counted(asked, chosen, tiny_network):
    """Size and bit operations of the network are those of the mean that was asked for."""
    made, before = chosen(**asked), account(tiny_network, IMAGE)
    layers, weights = counted_layers(tiny_network, made.quant)
    mean = sum(weights[c.name] * c.weight_bits for c in layers) / sum(weights.values())
    act_mean = sum(c.macs * c.act_bits for c in layers) / sum(c.macs for c in layers)
    if "target" in asked:
        assert mean == pytest.approx(made.mean_bits, abs=1e-12) and 4.4 < mean <= 4.5
        assert len({c.weight_bits for c in layers}) > 1 and act_mean == 8
    else:
        assert act_mean == pytest.approx(made.mean_act_bits, abs=1e-12) and 6.8 < act_mean <= 7
        assert len({c.act_bits for c in layers}) > 1 and mean == 4
    assert account(QuantModel(tiny_network, made.quant), IMAGE).parameters == before.parameters


@pytest.mark.parametrize("asked", [{"target": 4.5, "act_target": 7}, {"target": 4, "bounded": True}])
def test_both_operands_together_cost_what_uniform_widths_do(asked, chosen, tiny_network):
    made = chosen(positions=True, **asked)
    layers, weights = counted_layers(tiny_network, made.quant)
    mean = sum(weights[c.name] * c.weight_bits for c in layers) / sum(weights.values())
    target, act_target = asked["target"], asked.get("act_target", 8)
    assert mean == pytest.approx(made.mean_bits, abs=1e-12) and target - 0.1 < mean <= target
    operations = sum(c.macs * c.weight_bits * c.act_bits for c in layers) / sum(c.macs for c in layers)
    assert operations <= target * act_target
    assert len({c.weight_bits for c in layers}) > 1
    alone = chosen(positions=True, target=target)  # planted: without the bound there are more
    layers, _ = counted_layers(tiny_network, alone.quant)
    unbounded = sum(c.macs * c.weight_bits * c.act_bits for c in layers) / sum(c.macs for c in layers)
    assert unbounded > target * 8 * 1.05


def test_both_together_with_layers_that_have_a_width(chosen, tiny_network):
    """What is decided of one operand leaves the other free, and costs what it costs."""
    quant = QuantConfig(4, 8, layer_bits={"conv_in": "W8", "mid.block_1.conv1": "A16"})
    made = chosen(quant, target=5, act_target=9)
    layers, weights = counted_layers(tiny_network, made.quant)
    of = {c.name: c for c in layers}
    assert of["conv_in"].weight_bits == 8 and of["mid.block_1.conv1"].act_bits == 16
    assert sum(weights[c.name] * c.weight_bits for c in layers) <= 5 * sum(weights.values())
    assert sum(c.macs * c.weight_bits * c.act_bits for c in layers) <= 45 * sum(c.macs for c in layers)
    with pytest.raises(UserError, match="need more bit operations than the targets allow"):
        chosen(QuantConfig(4, 8, layer_bits={"mid.block_1.conv1": "A32"}), target=2, act_target=4)


def test_widths_of_weights_leave_inputs_as_they_are(chosen, tiny_network):
    """A wide input counts with its width, so that even the narrowest weights have room."""
    quant = QuantConfig(2, 2, act_dynamic=True, layer_bits={"first": "A16", "last": "A16"})
    for target in (2, 3):
        made = chosen(replace(quant, weight_bits=target), target=target, bounded=True, positions=True)
        layers, weights = counted_layers(tiny_network, made.quant)
        widths = {c.name: c.act_bits for c in layers}
        assert widths == {name: 16 if name in ("conv_in", "conv_out") else 2 for name in weights}
        assert sum(weights[c.name] * c.weight_bits for c in layers) <= target * sum(weights.values())
        uniform = target * sum(c.macs * c.act_bits for c in layers)
        operations = sum(c.macs * c.weight_bits * c.act_bits for c in layers)
        assert 0.95 * uniform < operations <= uniform
        assert (len({c.weight_bits for c in layers}) == 1) == (target == 2)


def test_only_what_is_asked_for_is_chosen(chosen):
    made = chosen(target=4)
    assert made.mean_act_bits is None and all(bits.act_bits is None for _, bits in made.quant.layer_bits)
    made = chosen(act_target=6)
    assert made.mean_bits is None and all(bits.weight_bits is None for _, bits in made.quant.layer_bits)


def test_layers_with_their_own_width_keep_it_and_count(chosen, tiny_network):
    quant = QuantConfig(4, 8, keep_ends=True, layer_bits={"first": "A16", "mid.block_1.conv1": "W32"})
    measured = {operand: set(layers_to_measure(tiny_network, quant, operand)) for operand in Operand}
    every = set(layer_places(tiny_network))
    assert every - measured[Operand.WEIGHTS] == {"conv_in", "conv_out", "mid.block_1.conv1"}
    assert every - measured[Operand.ACTIVATIONS] == {"conv_in", "conv_out"}
    with pytest.raises(UserError, match="a mean of 2 bits cannot be reached, because the smallest widths have"):
        chosen(quant, target=2)
    made = chosen(quant, target=6)
    own = QuantModel(tiny_network, made.quant)
    layers = own.layers()
    assert [q.bits for q in layers["conv_in"].weight_quantizers] == [8]
    assert [q.bits for q in layers["conv_in"].act_quantizers] == [16]
    assert len(layers["mid.block_1.conv1"].weight_quantizers) == 0
    weights = {n: layer.weight.numel() for n, layer in layers.items()}
    bits = {n: layer.weight_quantizers[0].bits if len(layer.weight_quantizers) else 32 for n, layer in layers.items()}
    mean = sum(weights[n] * bits[n] for n in weights) / sum(weights.values())
    assert mean == pytest.approx(made.mean_bits, abs=1e-12) and mean <= 6


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"target": 9.0}, "--target_bits is 9; give a mean width from 2 to 8"),
        ({"target": float("nan")}, "--target_bits is nan"),
        (
            {"target": 4.0, "candidates": (2, 9)},
            "--candidate_bits is 2,9; give different widths of weights, from 1 to 8",
        ),
        ({"target": 4.0, "candidates": (4, 4)}, "--candidate_bits is 4,4"),
        ({"act_target": 3.0}, "--target_act_bits is 3; give a mean width from 4 to 16"),
        ({"target": 4.0, "samples": 0}, "--sensitivity_samples is 0"),
    ],
)
def test_values_out_of_range(values, says):
    with pytest.raises(UserError, match=says):
        MixedPrecision(**values)
