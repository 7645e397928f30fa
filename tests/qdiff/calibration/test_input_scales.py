"""τ of one layer: in closed form, searched and learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.calibration import input_scales
from qdiff.calibration.feeding import Feeding
from qdiff.calibration.input_scales import InputScaling, Scaling, dilated, learned, product_errors, searched
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.interface import split_input
from qdiff.quant_layer import QuantModule

LAYERS = {
    "conv2d": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1),
    "split": lambda: split_input(nn.Conv2d(6, 4, 1), 4),
    "linear": lambda: nn.Linear(6, 4),
}


def layer_of(name="conv2d", **config):
    torch.manual_seed(0)
    return QuantModule(
        LAYERS[name](), QuantConfig(**{"weight_bits": 4, "act_bits": 8, "split_shortcut": True, **config})
    )


def inputs_of(name="conv2d", count=12):
    """Inputs of which channel 2 is 20 times the others."""
    x = torch.randn(count, 6, *([] if name == "linear" else [5, 5]), generator=torch.Generator().manual_seed(1))
    x[:, 2] *= 20
    return x


def ranges(weight, sizes):
    """Return the least and the largest weight of each output channel of each slice, 0 included as quantizers do."""
    parts = [part.flatten(1) for part in weight.double().split(sizes, 1)]
    return torch.stack([torch.stack([p.amin(1).clamp(max=0), p.amax(1).clamp(min=0)]) for p in parts])


@pytest.mark.parametrize("name", LAYERS)
def test_dilation_is_the_largest_that_leaves_the_weights_ranges(name):
    layer = layer_of(name)
    for part in layer.weight.data.split(layer.slices, 1):
        part[:, 0], part[:, 1] = 3.0, -3.0  # these set all ranges, and the others have room
    tau = dilated(layer)
    assert (tau >= 1).all() and (tau > 1).any()
    before, after = (ranges(layer.weight_over(1 / t), layer.slices) for t in (torch.ones(6), tau))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)
    for channel in range(6):  # 1 % more of any channel widens some range
        more = torch.where(torch.arange(6) == channel, 1.01, 1.0) * tau
        assert not torch.allclose(ranges(layer.weight_over(1 / more), layer.slices), before, rtol=1e-3, atol=0)


def test_channels_without_weights_are_not_dilated():
    layer = layer_of("linear")
    layer.weight.data[:, 3] = 0
    assert dilated(layer)[3] == 1


def expected_errors(layer, x, tau):
    """The squared error of a linear layer with min-max ranges, in float64."""

    def rounded(values, low, high, bits):
        low, high = low.clamp(max=0), high.clamp(min=0)
        delta = (high - low) / (2**bits - 1)
        zero = (-low / delta).round()
        return ((values / delta).round() + zero).clamp(0, 2**bits - 1).sub(zero) * delta

    x, weight, tau = x.double(), layer.weight.detach().double(), tau.double()
    given, scaled = x / tau, weight * tau
    given = rounded(given, given.min(), given.max(), 8)
    scaled = rounded(scaled, scaled.amin(1, keepdim=True), scaled.amax(1, keepdim=True), 4)
    return (given @ scaled.T - x @ weight.T).square().sum(1)


def test_errors_are_those_of_both_quantized_factors():
    layer, x = layer_of("linear"), inputs_of("linear")
    tau = torch.tensor([0.5, 3.0, 4.0, 1.0, 1.7, 0.9])
    found, wanted = product_errors(layer, x, tau).double(), expected_errors(layer, x, tau)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)
    assert not torch.allclose(found, expected_errors(layer, x, 1 / tau), rtol=0.1), "planted: τ the other way"


@pytest.mark.parametrize("name", LAYERS)
def test_search_lowers_the_error_of_a_layer_with_a_large_channel(name):
    layer, x = layer_of(name, act_bits=4), inputs_of(name)
    over = [d for d in range(x.dim()) if d != layer.channel_dim % x.dim()]
    tau = searched(layer, x.abs().amax(over), [x[:8], x[8:]])
    assert product_errors(layer, x, tau).sum() < 0.8 * product_errors(layer, x, torch.ones(6)).sum()
    assert tau[2] == tau.max() and abs(float(tau.log().mean())) < 1e-5


def fitted(layer, x, entries):
    made = InputScaling(Scaling.LEARNED, iterations=60, batch_size=8, lr=0.05, weighting=0.0)
    feeding = Feeding(torch.device("cpu"), 8)
    return learned(layer, x, entries, torch.ones(6), made, torch.Generator().manual_seed(0), feeding)


@pytest.mark.parametrize("name", ["split", "linear"])
def test_learning_lowers_the_error_of_a_layer_with_a_large_channel(name):
    layer, x = layer_of(name, act_bits=4), inputs_of(name)
    tau = fitted(layer, x, torch.zeros(12, dtype=torch.int64))
    assert (tau > 0).all() and tau[2] == tau.max()
    assert product_errors(layer, x, tau).sum() < 0.8 * product_errors(layer, x, torch.ones(6)).sum()


def test_a_batch_in_parts_is_the_batch():
    layer, x, entries = layer_of("linear", act_bits=None), inputs_of("linear"), torch.arange(12) % 3
    made = InputScaling(Scaling.LEARNED, iterations=3, batch_size=8, weighting=20.0)
    found = []
    for parts in (8, 3):
        feeding, generator = Feeding(torch.device("cpu"), parts), torch.Generator().manual_seed(0)
        found.append(learned(layer, x, entries, torch.ones(6), made, generator, feeding))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


def test_timesteps_of_large_loss_count_less():
    running = torch.tensor([1.0, 3.0, 4.0])
    expected = torch.tensor([0.875**20, 0.625**20, 0.5**20])
    torch.testing.assert_close(input_scales._weights(running, 20.0), expected)
    assert torch.equal(input_scales._weights(torch.zeros(3), 20.0), torch.ones(3)), "before any loss is known"


def test_numbers_out_of_range_are_refused():
    for wrong in ({"kind": "x"}, {"start": "learned"}, {"iterations": 0}, {"weighting": -1.0}, {"lr": 0.0}):
        with pytest.raises(UserError, match="give"):
            InputScaling(**wrong)
