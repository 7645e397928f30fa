"""Which layers are replaced: those that compute what a quantized layer computes; the others stay, and are named."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from qdiff.config import QuantConfig
from qdiff.interface import AttentionCore
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

W4 = QuantConfig(weight_bits=4)


class StandardisedConv(nn.Conv2d):
    """Weight standardisation, as many image networks have it."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class LowRankLinear(nn.Linear):
    """A linear layer with an adapter beside it."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.randn(sizes[1], 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.t() @ self.up.t()


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class OwnCore(AttentionCore):
    def forward(self, q, k, v):
        return v


class Renamed(nn.Conv2d):
    """Only the name differs."""


def patched():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    layer.forward = lambda x: F.relu(x)
    return layer


OTHERS = {
    "standardised": (lambda: StandardisedConv(4, 4, 3, padding=1), "StandardisedConv has a forward of its own"),
    "own convolution": (lambda: OwnConvolution(4, 4, 3, padding=1), "OwnConvolution has a forward of its own"),
    "patched": (patched, "Conv2d has a forward of its own"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
        "its weight is parametrized",
    ),
    "weight norm": (lambda: weight_norm(nn.Conv2d(4, 4, 3, padding=1)), "Conv2d computes its weight"),
    "circular": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "its padding is circular"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1), "ConvTranspose2d cannot be quantized"),
    "depth": (lambda: nn.Sequential(nn.Unflatten(0, (1, -1)), nn.Conv3d(2, 2, 1)), "Conv3d cannot be quantized"),
}


class Network(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.first, self.other = nn.Conv2d(4, 4, 3, padding=1), other

    def forward(self, x):
        return self.other(self.first(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_layers_that_compute_something_else_stay(name, caplog):
    make, reason = OTHERS[name]
    torch.manual_seed(0)
    network = Network(make()).eval()
    x = torch.randn(2, 4, 8, 8)
    expected = network(x)
    with caplog.at_level(logging.WARNING, logger="qdiff"):
        qnn = QuantModel(network, W4)
    assert torch.equal(qnn(x), expected)
    assert list(qnn.layers()) == ["first"]
    assert len(qnn.left_in_float) == 1 and set(qnn.left_in_float.values()) == {reason}
    assert f"1 layers stay in float: {next(iter(qnn.left_in_float))} ({reason})" in caplog.text


@torch.no_grad()
def test_multihead_attention_and_adapters_stay_whole():
    torch.manual_seed(0)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.adapted = nn.Linear(8, 8), LowRankLinear(8, 8)
            self.attention, self.core = nn.MultiheadAttention(8, 2, batch_first=True), OwnCore()

        def forward(self, x):
            x = self.adapted(self.first(x))
            return self.core(x, x, self.attention(x, x, x)[0])

    network, x = Tokens().eval(), torch.randn(2, 5, 8)
    expected = network(x)
    qnn = QuantModel(network, W4)
    assert torch.equal(qnn(x), expected) and list(qnn.layers()) == ["first"]
    assert qnn.left_in_float == {
        "adapted": "LowRankLinear has a forward of its own",
        "attention": "MultiheadAttention cannot be quantized",
        "core": "OwnCore has a forward of its own",
    }


def test_a_subclass_that_computes_the_same_is_replaced():
    qnn = QuantModel(Network(Renamed(4, 4, 3, padding=1)), W4)
    assert list(qnn.layers()) == ["first", "other"] and qnn.left_in_float == {}


@torch.no_grad()
def test_hooks_go_on_and_their_handles_still_remove_them():
    network, seen = Network(nn.Conv2d(4, 4, 1)), []
    before = network.other.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    after = network.other.register_forward_hook(lambda *_: seen.append("after"))
    x = torch.randn(1, 4, 8, 8)
    expected = network(x)
    qnn = QuantModel(network, W4)
    assert torch.equal(qnn(x), expected) and seen == ["after"] * 2
    before.remove()
    after.remove()
    assert not torch.equal(qnn(x), expected) and len(seen) == 2


def test_full_backward_hooks_go_on():
    network, seen = Network(nn.Conv2d(4, 4, 1)), []
    network.other.register_full_backward_hook(lambda *_: seen.append("backward"))
    qnn = QuantModel(network, W4)
    qnn(torch.randn(1, 4, 8, 8, requires_grad=True)).sum().backward()
    assert seen == ["backward"]


class Twice(nn.Module):
    """One module in two places."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(4, 4, 3, padding=1)
        self.two = self.one

    def forward(self, x):
        return self.two(self.one(x))


@torch.no_grad()
def test_a_module_used_twice_is_one_quantized_module(data):
    network, x = Twice(), torch.randn(2, 4, 8, 8)
    expected = network(x)
    qnn = QuantModel(network, W4)
    assert isinstance(network.one, QuantModule) and network.two is network.one and len(qnn.layers()) == 1
    assert torch.equal(qnn(x), expected)
    network.one.init_weight_ranges(W4.weight_range)
    with qnn.quantized():
        quantized = qnn(x)
    qnn.release_float_weights()
    with qnn.quantized():
        assert torch.equal(qnn(x), quantized)


@torch.no_grad()
def test_layers_that_share_a_weight_get_integers_of_their_own():
    network = Network(nn.Conv2d(4, 4, 3, padding=1))
    network.other.weight = network.first.weight
    qnn = QuantModel(network, W4)
    for number, layer in enumerate(qnn.layers().values()):
        layer.init_weight_ranges(W4.weight_range)
        layer.set_weight_int(layer.weight_int + number)
    x = torch.randn(2, 4, 8, 8)
    with qnn.quantized():
        expected = qnn(x)
    qnn.release_float_weights()  # writes into the weights
    with qnn.quantized():
        assert torch.equal(qnn(x), expected)


@torch.no_grad()
def test_layers_that_share_a_bias_get_corrections_of_their_own():
    network = Network(nn.Conv2d(4, 4, 3, padding=1))
    network.other.bias = network.first.bias
    x = torch.randn(2, 4, 8, 8)
    expected = network(x)
    qnn = QuantModel(network, W4)
    first, other = qnn.layers().values()
    before = other.bias.clone()
    first.set_quantized_bias(first.bias + 1)
    assert torch.equal(other.bias, before) and torch.equal(qnn(x), expected)
