"""The noise of a weight, from gradients: exact gradients, and the error that rounding column by column has."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.calibration import weight_noise
from qdiff.calibration.column_rounding import Grid, round_matrix
from qdiff.calibration.input_moments import column_order
from qdiff.calibration.weight_noise import WeightNoise
from qdiff.config import QuantConfig

EXACT = 1e-9  # relative, in float64
SPREAD = 1.5  # dB: the model has independent errors, and the columns' grid is clipped


def noise_of(layer, widths=(4,), name="layer", config=None):
    config = QuantConfig(4, None, weight_range="mse") if config is None else config
    return WeightNoise(layer, name, config, widths, None, torch.Generator().manual_seed(0))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), (5, 4, 7, 7)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), (5, 4, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 2), (5, 3, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("copies", [1, 2])
def test_gradients_are_those_of_every_sample(kind, copies):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().double()
    noise = noise_of(layer)
    calls = [torch.randn(copies * shape[0], *shape[1:], dtype=torch.float64) for _ in range(3)]
    noise.start(shape[0], copies)
    with layer.register_forward_hook(noise.on_output):
        outs = [layer(x) for x in calls]
        factors = [torch.randn_like(out) for out in outs]
        sum((out * factor).sum() for out, factor in zip(outs, factors, strict=True)).backward()
    for sample in range(shape[0]):
        rows = [sample + copy * shape[0] for copy in range(copies)]
        layer.zero_grad()
        sum((layer(x[rows]) * f[rows]).sum() for x, f in zip(calls, factors, strict=True)).backward()
        expected = layer.weight.grad.flatten(1)[:, column_order(noise.shape)]
        assert (noise._gradient[sample] - expected).abs().max() < EXACT * expected.abs().max()
        if layer.bias is not None:
            assert (noise._bias_gradient[sample] - layer.bias.grad).abs().max() < EXACT * layer.bias.grad.abs().max()


def errors_of(rank, bits, spread=0.0):
    """What is thought of the error of a rounded weight, that error, and that of rounding to nearest, in dB.

    Args:
        rank: dimensions of the inputs.
        spread: of what every channel has for itself.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, rank, generator=generator) @ torch.randn(rank, 32, generator=generator)
    if spread:
        x = x + spread * torch.randn(512, 32, generator=generator)
    layer = nn.Linear(32, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 32, generator=generator))
    noise = noise_of(layer, (bits,))
    noise.keep(x, 4096)
    noise.start(len(x), 1)
    with layer.register_forward_hook(noise.on_output):
        out = layer(x)
        # A projection onto independent numbers has the square of the output's error.
        (out * torch.randn(out.shape, generator=generator)).sum().backward()
    noise.finish()
    made = noise.shape
    made.init_weight_ranges("mse")
    delta, zero_point = (t.expand_as(made.weight) for t in made.weight_grid())
    q = round_matrix(layer.weight.detach(), Grid(delta, zero_point, bits), 2 * x.mT @ x / len(x))
    weights = (q - zero_point) * delta, made.dequantized_weight()
    errors = [(x @ (weight - layer.weight.detach()).float().mT).square().sum() for weight in weights]
    return noise.quality(1.0)[bits], *(float(-10 * error.log10()) for error in errors)


@pytest.mark.parametrize("bits", [3, 4])
def test_it_predicts_the_error_of_rounding_column_by_column(bits):
    """On inputs whose channels go together, rounding to nearest has several times the error."""
    predicted, actual, nearest = errors_of(8, bits, spread=0.2)
    assert abs(predicted - actual) < SPREAD
    assert predicted - nearest > 3 * SPREAD  # planted: that of rounding to nearest


@pytest.mark.parametrize("rank", [3, 6])
def test_narrow_grids_are_left(rank, monkeypatch):
    """Few columns must make up for all others, which at 2 bits takes them beyond their grid."""
    predicted, actual, _ = errors_of(rank, 2)
    assert abs(predicted - actual) < 2 * SPREAD
    monkeypatch.setattr(weight_noise, "CLIPPED_BITS", 1)  # planted: as if every grid reached far enough
    predicted, actual, _ = errors_of(rank, 2)
    assert predicted - actual > 2 * SPREAD


def test_a_bias_takes_the_mean():
    """An input without any variation makes no noise where there is a bias, and noise where there is none."""
    torch.manual_seed(0)
    found = {}
    for bias in (True, False):
        layer = nn.Linear(5, 4, bias=bias)
        x = torch.ones(3, 5)
        noise = noise_of(layer)
        noise.keep(x, 64)
        noise.start(3, 1)
        with layer.register_forward_hook(noise.on_output):
            (layer(x) * torch.randn(3, 4)).sum().backward()
        noise.finish()
        found[bias] = noise.quality(1.0)[4]
    assert found[True] > found[False] + 60


def test_a_layer_that_is_never_called():
    noise = noise_of(nn.Linear(5, 4))
    noise.start(1, 1)
    noise.finish()
    assert noise.quality(1.0) is None
