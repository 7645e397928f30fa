"""Quantized layers against the float layer with hand-made weights and inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.config import QuantConfig
from qdiff.functional import fake_quantize_inference
from qdiff.interface import split_input
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.ranges.estimators import RangeMethod

# Relative L2: convolutions of the same numbers, possibly in another order of summation.
OUTPUT_TOLERANCE = 1e-6

LAYERS = {
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "conv2d_grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, dilation=2, bias=False), (2, 6, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 8)),
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6)),
}


def layer_and_input(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make(), torch.randn(shape)


def set_input_range(module, x, dim=1):
    parts = [x] if len(module.slices) == 1 else x.split(module.slices, dim=dim)
    for quantizer, part in zip(module.act_quantizers, parts, strict=True):
        quantizer.set((part.amax() - part.amin()) / (2**quantizer.bits - 1), torch.tensor(2 ** (quantizer.bits - 1)))


@pytest.mark.parametrize("name", LAYERS)
def test_unquantized_is_the_float_layer(name):
    layer, x = layer_and_input(name)
    expected = layer(x)
    module = QuantModule(layer, QuantConfig(4, 8))
    assert torch.equal(module(x), expected)
    assert module.weight is layer.weight and module.bias is layer.bias


@pytest.mark.parametrize("name", LAYERS)
def test_quantized_is_the_float_layer_on_quantized_numbers(name, relative):
    layer, x = layer_and_input(name)
    module = QuantModule(layer, QuantConfig(4, 8))
    module.init_weight_ranges(RangeMethod.MIN_MAX)
    set_input_range(module, x)
    with leaf_modes([module], weights=True, activations=True), torch.no_grad():
        out = module(x)
    # Rows of the weight, each rounded to 15 steps between its extremes (0 included), in plain torch.
    rows = module.weight.detach().flatten(1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    delta = ((high - low) / 15)[:, None]
    zero = torch.round(-low[:, None] / delta)
    weight = ((torch.round(rows / delta) + zero).clamp(0, 15) - zero) * delta
    quantizer = module.act_quantizers[0]
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        given = fake_quantize_inference(x, quantizer.delta, quantizer.zero_point, 8)
        assert relative(out, layer(given)) < OUTPUT_TOLERANCE
        layer.weight.mul_(1.01)
        assert relative(out, layer(given)) > OUTPUT_TOLERANCE


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_to_nearest_is_within_half_a_step(symmetric):
    layer, _ = layer_and_input("conv2d")
    module = QuantModule(layer, QuantConfig(4, weight_symmetric=symmetric))
    module.init_weight_ranges(RangeMethod.MIN_MAX)
    error = (module.dequantized_weight() - module.weight).abs()
    # An extreme may fall a whole step outside where the zero point itself was rounded.
    assert (error <= module.weight_quantizers[0].delta * 1.001).all()
    assert (error.flatten().sort().values[: error.numel() * 9 // 10]).max() <= module.weight_quantizers[0].delta.max()
    assert module.weight_int.dtype == torch.uint8 and module.weight_int.max() <= 15


@pytest.mark.parametrize(
    ("layer", "shape", "dim"), [(nn.Conv2d(6, 32, 1), (2, 6, 8, 8), 1), (nn.Linear(6, 32), (128, 6), -1)]
)
def test_split_slices_have_their_own_quantizers(layer, shape, dim, relative):
    torch.manual_seed(0)
    x = torch.randn(shape)
    x.narrow(dim, 2, 4).mul_(50)  # two very different distributions
    with torch.no_grad():
        layer.weight[:, 2:].mul_(0.01)
    expected = layer(x)
    errors = {}
    for split in (False, True):
        module = QuantModule(split_input(layer, 2), QuantConfig(4, 8, split_shortcut=split))
        assert len(module.weight_quantizers) == len(module.act_quantizers) == len(module.slices) == 1 + split
        module.init_weight_ranges(RangeMethod.MIN_MAX)
        set_input_range(module, x, dim)
        with leaf_modes([module], weights=True, activations=True), torch.no_grad():
            errors[split] = relative(module(x), expected)
    assert module.slices == [2, 4]
    assert errors[True] < errors[False] / 2


def test_split_at_has_no_effect_without_the_option():
    module = QuantModule(split_input(nn.Conv2d(6, 4, 1), 2), QuantConfig(4, 8))
    assert module.slices == [6]


def test_new_integers_are_used_while_weights_are_quantized():
    """Loading a checkpoint inside ``qnn.quantized()`` must not leave a stale or a missing weight."""
    layer, x = layer_and_input("conv2d")
    module = QuantModule(layer, QuantConfig(4))
    module.init_weight_ranges(RangeMethod.MIN_MAX)
    with leaf_modes([module], weights=True, activations=False), torch.no_grad():
        before = module(x)
        module.set_weight_int(module.weight_quantizers[0].zero_point.expand_as(module.weight))  # all weights 0
        after = module(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, layer.bias[None, :, None, None].expand_as(after))


def test_padding_other_than_zeros_is_refused():
    with pytest.raises(ValueError, match="reflect"):
        QuantModule(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), QuantConfig())


def test_no_weight_width_means_no_weight_state():
    module = QuantModule(nn.Linear(3, 2), QuantConfig(weight_bits=None, act_bits=8))
    assert not any("weight_int" in k or "weight_quantizers" in k for k in module.state_dict())
