"""One layer quantized and the rest in float: against a quantized network, and by hand in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from qdiff.calibration.run import init_weights
from qdiff.calibration.sensitivity import SQNR_CAP, Measure, Operand, OutputQuality, layer_sensitivity
from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel
from qdiff.wrapping import layer_places

W4A8 = QuantConfig(4, 8, split_shortcut=True)
SPLIT = "up.0.block.0.nin_shortcut"
TOLERANCE = 1e-6  # dB


@pytest.fixture
def measured(tiny_network, held_out):
    quality = OutputQuality(tiny_network, held_out, batch_size=5)
    return lambda *args: layer_sensitivity(tiny_network, *args, quality)


def sqnr(found, wanted):
    found, wanted = found.double(), wanted.double()
    return 10 * math.log10(float(wanted.square().sum() / (found - wanted).square().sum()))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["conv_in", SPLIT, "mid.block_1.conv2"])
def test_weights_are_those_of_a_network_with_one_quantized_layer(name, measured, tiny_network, held_out):
    expected = {}
    for bits in (2, 4, 8):
        others = {n: "W32" for n in layer_places(tiny_network) if n != name}
        qnn = QuantModel(copy.deepcopy(tiny_network), QuantConfig(bits, split_shortcut=True, layer_bits=others))
        init_weights(qnn)
        with qnn.quantized():
            expected[bits] = sqnr(torch.cat([qnn(x, t) for x, t in batches(held_out)]), tiny_network(*held_out))
    found = measured(name, W4A8, Operand.WEIGHTS, (2, 4, 8))
    # Sums of other batches differ in last bits, which 8-bit noise shows.
    assert all(abs(found[bits] - expected[bits]) < 0.05 for bits in expected), (found, expected)
    assert found[2] < found[4] - 3 < found[8] - 6  # a planted other width is far from it


def batches(inputs):
    return zip(*(part.split(5) for part in inputs), strict=True)


@pytest.mark.slow
@torch.no_grad()
def test_activations_are_rounded_with_the_range_of_the_samples(tiny_network, held_out):
    """The input of the first layer, rounded by hand in float64."""
    network = tiny_network.double()
    x, t = held_out[0].double(), held_out[1]
    quality = OutputQuality(network, (x, t), 16)
    found = layer_sensitivity(network, "conv_in", W4A8, Operand.ACTIVATIONS, (3, 6), quality)
    wanted = network(x, t)
    for bits, value in found.items():
        low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
        delta = torch.tensor((high - low) / (2**bits - 1), dtype=torch.float32).double()  # ranges are float32
        zero = torch.round(-low / delta)
        rounded = (((x / delta).round() + zero).clamp(0, 2**bits - 1) - zero) * delta
        assert abs(value - sqnr(network(rounded, t), wanted)) < TOLERANCE
        planted = rounded + delta / 100
        assert abs(value - sqnr(network(planted, t), wanted)) > TOLERANCE


@torch.no_grad()
def test_the_network_is_as_before(measured, tiny_network, held_out):
    before, modules, state = (
        tiny_network(*held_out),
        list(tiny_network.modules()),
        copy.deepcopy(tiny_network.state_dict()),
    )
    for operand in Operand:
        measured(SPLIT, W4A8, operand, (4,))
    with pytest.raises(ZeroDivisionError):
        layer_sensitivity(tiny_network, "conv_in", W4A8, Operand.WEIGHTS, (4,), lambda: 1 / 0)
    assert torch.equal(tiny_network(*held_out), before) and list(tiny_network.modules()) == modules
    assert all(torch.equal(value, state[name]) for name, value in tiny_network.state_dict().items())


def test_dynamic_ranges(measured):
    config = QuantConfig(4, 8, act_dynamic=True)
    found = measured("conv_in", config, Operand.ACTIVATIONS, (4, 8))
    assert found[4] < found[8] - 10


class Uneven(torch.nn.Module):
    """A layer used in two places, one that is never called, and one without any effect."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(4, 4)
        self.blocks = torch.nn.ModuleList([self.one])
        self.unused = torch.nn.Linear(4, 4)
        self.silent = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.one(self.blocks[0](x)) + 0 * self.silent(x)


def test_layers_that_are_shared_unused_or_without_effect():
    torch.manual_seed(0)
    network, x = Uneven(), torch.randn(3, 4)
    assert set(layer_places(network)) == {"one", "unused", "silent"}
    assert len(layer_places(network)["one"]) == 2
    quality = OutputQuality(network, (x,), 2)
    found = {n: layer_sensitivity(network, n, W4A8, Operand.WEIGHTS, (2, 8), quality) for n in layer_places(network)}
    assert found["unused"] is None and found["silent"] == {2: SQNR_CAP, 8: SQNR_CAP}
    with torch.no_grad():
        qnn = QuantModel(copy.deepcopy(network), QuantConfig(2, layer_bits={"silent": "W32"}))
        init_weights(qnn)
        with qnn.quantized():
            assert abs(found["one"][2] - sqnr(qnn(x), network(x))) < 1e-4
    for operand in Operand:
        assert layer_sensitivity(network, "unused", W4A8, operand, (4,), quality) is None


def test_losses_add_up_where_decibels_do_not():
    assert Measure.SQNR.loss(20.0) == pytest.approx(0.01) and Measure.SSIM.loss(0.9) == pytest.approx(0.1)
    assert Measure.SSIM.loss(1.0000001) == 0.0


@torch.no_grad()
def test_on_a_gpu_it_waits_once_per_value(cuda, tiny_network, held_out):
    network = tiny_network.to("cuda")
    quality = OutputQuality(network, held_out, 16)
    with cuda.counting() as counts:
        found = layer_sensitivity(network, "conv_in", W4A8, Operand.WEIGHTS, (4,), quality)
    assert 0 < found[4] < 60
    assert len(counts.waits) <= 4
