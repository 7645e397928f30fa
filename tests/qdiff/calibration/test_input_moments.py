"""Second moments of inputs: rows as F.unfold gives them, sums that do not depend on batches, and thinning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdiff.calibration import input_moments
from qdiff.calibration.input_moments import InputMoments, column_order, input_patches, input_rows
from qdiff.config import QuantConfig
from qdiff.quant_layer import QuantModule

EXACT = 1e-9  # relative, in float64
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "tokens": (lambda: nn.Linear(6, 4), (5, 7, 6)),
    "conv": (lambda: nn.Conv2d(6, 4, 3, padding=1), (5, 6, 5, 4)),
    "stride": (lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (5, 6, 6, 5)),
    "dilation": (lambda: nn.Conv2d(6, 4, 3, dilation=(1, 2), padding=2), (5, 6, 6, 6)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (5, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (5, 6, 5, 5)),
    "same": (lambda: nn.Conv2d(6, 4, (4, 3), padding="same"), (5, 6, 5, 5)),
    "valid": (lambda: nn.Conv2d(6, 4, 3, padding="valid"), (5, 6, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1, groups=2), (5, 6, 9)),
}


def made(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = torch.randn(shape, dtype=torch.float64)
    return QuantModule(layer().double(), QuantConfig(4)), x, x + 0.1 * torch.randn_like(x)


def rows_in_order(layer, x, chosen=None):
    """Rows with the columns of the weight."""
    return input_rows(layer, x, chosen)[..., column_order(layer).argsort()]


def close(found, expected):
    return bool((found - expected).norm() <= EXACT * expected.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_weight_are_the_output(name):
    """Padding, stride, dilation, groups and the order of a kernel's weights."""
    layer, x, _ = made(name)
    rows, groups = input_rows(layer, x), 1 if layer.geometry is None else layer.geometry.groups
    weights = layer.weight.flatten(1)[:, column_order(layer)].unflatten(0, (groups, -1))
    found = torch.einsum("pgk,grk->pgr", rows, weights).flatten(1) + layer.bias
    expected = layer(x).movedim(layer.channel_dim, -1).flatten(0, -2)
    assert close(found, expected)
    assert not close(found, expected.flip(0))


def test_rows_of_a_convolution_are_those_of_unfold():
    layer, x, _ = made("dilation")
    expected = F.unfold(x, 3, dilation=(1, 2), padding=2).mT
    assert torch.equal(rows_in_order(layer, x)[:, 0], expected.flatten(0, 1))


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_the_patches(name):
    layer, x, _ = made(name)
    patches = input_patches(layer, x)
    assert torch.equal(rows_in_order(layer, x).flatten(), patches.flatten())
    where = patches.shape[: -layer.weight.dim()]
    odd = torch.arange(where.numel()).view(where) % 2 == 1
    assert torch.equal(rows_in_order(layer, x, {where: odd}.get).flatten(), patches[odd].flatten())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("most_rows", [None, 11])
def test_streamed_moments_are_those_of_the_whole(name, most_rows, monkeypatch):
    layer, x, quantized = made(name)
    whole, streamed = (InputMoments(layer, len(x), most_rows) for _ in range(2))
    whole.add(x, quantized)
    monkeypatch.setattr(input_moments, "PATCH_BYTES", 1)  # sample by sample
    for rows in (slice(0, 2), slice(2, 5)):
        streamed.add(x[rows], quantized[rows], rows.start)
    assert whole.used == streamed.used
    assert close(streamed.inputs, whole.inputs) and close(streamed.cross, whole.cross)


@pytest.mark.parametrize("name", LAYERS)
def test_the_formulas(name):
    layer, x, quantized = made(name)
    moments = InputMoments(layer, len(x))
    moments.add(x, quantized)
    rows, in_float = rows_in_order(layer, quantized), rows_in_order(layer, x)
    expected = 2 * torch.einsum("ngk,ngl->gkl", rows, rows) / len(rows)
    assert close(moments.inputs, expected)
    assert close(moments.cross, 2 * torch.einsum("ngk,ngl->gkl", in_float - rows, rows) / len(rows))
    assert not close(moments.inputs, expected * (1 + 1e-8))
    for found, every in zip(moments.means, (in_float, rows), strict=True):
        assert close(found, every.mean(0))


def test_a_layer_that_is_called_twice_adds_both():
    layer, x, quantized = made("tokens")
    twice, whole = InputMoments(layer, 5), InputMoments(layer, 10)
    twice.add(x, quantized)
    twice.add(x * 2, quantized * 2)
    whole.add(torch.cat([x, x * 2]), torch.cat([quantized, quantized * 2]))
    assert close(twice.inputs, whole.inputs) and close(twice.cross, whole.cross)


def test_thinning_takes_other_positions_of_every_sample():
    layer, x, quantized = made("conv")  # 5 samples of 20 positions
    moments = InputMoments(layer, 5, most_rows=25)
    moments.add(x, quantized)
    rows = rows_in_order(layer, quantized)[:, 0].unflatten(0, (5, -1))
    chosen = [row for n in range(5) for p, row in enumerate(rows[n]) if (n + p) % 4 == 0]
    rows = torch.stack(chosen)
    assert moments.used == len(rows) == 25
    assert close(moments.inputs[0], 2 / 25 * rows.T @ rows)


@pytest.mark.parametrize("name", LAYERS)
def test_batches_of_which_no_row_is_taken(name):
    layer, x, quantized = made(name)
    whole, streamed = (InputMoments(layer, len(x), most_rows=1) for _ in range(2))
    whole.add(x, quantized)
    for sample in range(len(x)):
        streamed.add(x[sample : sample + 1], quantized[sample : sample + 1], sample)
    assert whole.used == streamed.used < streamed.rows
    assert close(streamed.inputs, whole.inputs)


def test_without_a_cross_moment():
    layer, x, quantized = made("linear")
    moments = InputMoments(layer, 5, cross=False)
    moments.add(x, quantized)
    assert moments.cross is None and moments.inputs.shape == (1, 6, 6)
