"""Layers that scale their input's channels: Q(x/τ)·Q(τ·W), in every form of a weight, in files and in the account."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.run import CalibrationRun
from qdiff.checkpoint import load_checkpoint, load_packed, save_checkpoint
from qdiff.checkpoint.metadata import CHECKSUM, FORMAT, SCALED_FORMAT, checksum, read_metadata
from qdiff.checkpoint.native import content_hash
from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.deploy.weight_format import WriteOptions
from qdiff.deploy.weight_plan import plan_weights
from qdiff.errors import UserError
from qdiff.interface import split_input
from qdiff.methods import linear
from qdiff.modes import leaf_modes, scaled_layers
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

W4A8 = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True}
# Relative L2: float32 sums in another order. A factor that one channel lacks is above 1e-2 in every layer here.
SUM_TOLERANCE = 1e-5

LAYERS = {
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, dilation=2, bias=False), (2, 6, 8, 8)),
    "split": (lambda: split_input(nn.Conv2d(6, 4, 1), 4), (2, 6, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), (2, 6, 8)),
    "linear": (lambda: nn.Linear(6, 4), (2, 5, 6)),
}
# … and 8-bit numbers in one factor; τ in one factor alone is an error of 0.3 and more.
LEVELS_TOLERANCE = 0.05
TAU = torch.tensor([0.5, 3.0, 0.3, 1.0, 1.7, 0.9])


def parts_of(name, layer, x):
    """Return the slices of an input; the weight of a layer with groups has fewer channels than its input."""
    return [x] if name == "grouped" else x.split(layer.slices, layer.channel_dim)


def layer_of(name, tau=TAU, **config):
    """Return a quantized layer with min-max ranges of a random input, and that input."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    x = torch.randn(shape)
    layer = QuantModule(make(), QuantConfig(**{**W4A8, **config}))
    if tau is not None:
        layer.set_input_scale(1 / tau)
    if len(layer.weight_quantizers):
        layer.init_weight_ranges("max")
    for quantizer, part in zip(layer.act_quantizers, parts_of(name, layer, layer.scaled_input(x)), strict=False):
        delta = (part.max() - part.min()) / (2**quantizer.bits - 1)
        quantizer.set(delta, (-part.min() / delta).round())
    return layer, x


def expected_output(name, layer, x, tau):
    """Q(x/τ)·Q(τ·W) in float64, from the ranges and integers of the layer."""
    torch.manual_seed(0)
    other = LAYERS[name][0]().double()
    shape = [1, -1] + [1] * (x.dim() - 2) if layer.geometry is not None else [-1]
    scaled, grids = x.double() / tau.double().view(shape), []
    for quantizer, part in zip(layer.act_quantizers, parts_of(name, layer, scaled), strict=True):
        delta, zero = quantizer.delta.double(), quantizer.zero_point
        grids.append(((part / delta).round() + zero).clamp(0, 255).sub(zero) * delta)
    integers = layer.weight_int.split(layer.slices, 1)
    weights = [
        (q.double() - w.zero_point) * w.delta.double() for q, w in zip(integers, layer.weight_quantizers, strict=True)
    ]
    other.weight.data.copy_(torch.cat(weights, 1))
    if other.bias is not None:
        other.bias.data.copy_(layer.bias)
    return other(torch.cat(grids, layer.channel_dim))


def quantized(layer, x, weights=True, activations=True):
    with torch.no_grad(), leaf_modes([layer], weights=weights, activations=activations):
        return layer(x)


@pytest.mark.parametrize("name", LAYERS)
def test_it_is_the_product_of_scaled_factors(name, relative):
    layer, x = layer_of(name)
    found, wanted = quantized(layer, x), expected_output(name, layer, x, TAU)
    assert relative(found, wanted) < SUM_TOLERANCE
    without = torch.where(torch.arange(6) == 1, 1.0, TAU)  # planted: one channel is not scaled
    assert relative(found, expected_output(name, layer, x, without)) > 1e3 * SUM_TOLERANCE


@pytest.mark.parametrize("name", LAYERS)
def test_in_float_nothing_changes_and_one_factor_alone_in_float_cancels(name, relative):
    layer, x = layer_of(name)
    plain, _ = layer_of(name, tau=None)
    assert torch.equal(layer(x), plain(x)), "to the bit"
    half = layer_of(name, weight_bits=None)[0]
    assert relative(quantized(half, x), plain(x)) < LEVELS_TOLERANCE, "8-bit inputs and τ·W in float"
    half = layer_of(name, act_bits=None, weight_bits=8)[0]
    assert relative(quantized(half, x), plain(x)) < LEVELS_TOLERANCE, "x/τ in float and 8-bit weights"


@pytest.mark.parametrize("name", LAYERS)
def test_scales_of_one_change_nothing_to_the_bit(name):
    plain, x = layer_of(name, tau=None)
    wanted = quantized(plain, x)
    layer, _ = layer_of(name, tau=torch.ones(6))
    assert layer.input_scale is None, "factors of 1 are no factors"
    layer.input_scale = torch.ones(6)
    layer.init_weight_ranges("max")
    assert torch.equal(quantized(layer, x), wanted)


def test_a_scaled_layer_does_not_wait_for_the_gpu(cuda, relative):
    layer, x = layer_of("split")
    wanted = quantized(layer, x)
    layer, x = layer.to("cuda"), x.to("cuda")
    with torch.no_grad(), leaf_modes([layer], weights=True, activations=True), cuda.counting() as counts:
        found = layer(x)
    assert not counts.waits
    assert relative(found.cpu(), wanted) < SUM_TOLERANCE


def test_what_is_no_scale_is_refused():
    layer, _ = layer_of("conv2d")
    for wrong in (torch.ones(5), torch.tensor([1.0, 0, 1, 1, 1, 1]), torch.tensor([1.0, torch.inf, 1, 1, 1, 1])):
        with pytest.raises(ValueError, match="factors"):
            layer.set_input_scale(wrong)


def test_half_precision_leaves_the_factors_in_float32():
    layer, x = layer_of("conv2d")
    assert layer.half().input_scale.dtype is torch.float32
    assert layer.scaled_input(x.half()).dtype is torch.float16
    assert layer.double().input_scale.dtype is torch.float64


@pytest.fixture
def scaled(wrap, data):
    """``scaled(**config)``: the tiny network with random factors, and ranges set by the linear recipe."""

    def made(**config):
        qnn = wrap(**{**W4A8, **config})
        generator = torch.Generator().manual_seed(5)
        for layer in qnn.layers().values():
            layer.set_input_scale(torch.exp(torch.randn(layer.in_channels, generator=generator) * 0.3))
        linear.calibrate(qnn, data, None, CalibrationRun(show_progress=False))
        return qnn

    return made


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"act_bits": None}, {"weight_bits": None}, {"act_ranges": "timestep"}], ids=str)
def test_a_file_gives_back_every_bit(config, scaled, wrap, held_out, run_quantized, tmp_path):
    qnn, path = scaled(**config), tmp_path / "q.safetensors"
    given = held_out if "act_ranges" not in config else (held_out[0][:12], torch.arange(12) * (1000 // 12))
    save_checkpoint(qnn, path)
    again = wrap(**{**W4A8, **config})
    load_checkpoint(again, path)
    assert torch.equal(run_quantized(again, given), run_quantized(qnn, given))
    assert content_hash(again) == content_hash(qnn)
    assert torch.equal(again(*given), wrap(**W4A8)(*given)), "in float it is the float network"
    load_checkpoint_without = wrap(**{**W4A8, **config})
    load_checkpoint_without.load_state_dict(qnn.state_dict())
    assert torch.equal(run_quantized(load_checkpoint_without, given), run_quantized(qnn, given))


@pytest.mark.slow
def test_files_say_that_they_need_a_reader_of_scales(scaled, calibrated, wrap, tmp_path):
    path, plain = tmp_path / "scaled.safetensors", tmp_path / "plain.safetensors"
    save_checkpoint(scaled(), path)
    save_checkpoint(calibrated(**W4A8), plain)
    assert (read_metadata(path)["format"], read_metadata(plain)["format"]) == (SCALED_FORMAT, FORMAT)
    assert set(load_file(path)) - set(load_file(plain)) == {"input_scale"}
    qnn = wrap(**W4A8)
    load_checkpoint(qnn, path)
    assert scaled_layers(qnn.model)
    load_checkpoint(qnn, plain)
    assert not scaled_layers(qnn.model), "a file without factors removes them"


def test_a_damaged_scale_is_refused_before_anything_changes(scaled, wrap, tmp_path):
    path = tmp_path / "q.safetensors"
    save_checkpoint(scaled(), path)
    tensors, metadata = load_file(path), read_metadata(path)
    tensors["input_scale"] = tensors["input_scale"][:-9]
    metadata[CHECKSUM] = checksum(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    qnn = wrap(**W4A8)
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(qnn, path)
    assert not scaled_layers(qnn.model)


@pytest.mark.slow
def test_packed_weights_compute_the_same(scaled, tiny_network, held_out, run_quantized, tmp_path):
    qnn, path = scaled(), tmp_path / "q.safetensors"
    save_checkpoint(qnn, path)
    packed = load_packed(copy.deepcopy(tiny_network), path)
    assert torch.equal(run_quantized(packed, held_out), run_quantized(qnn, held_out))
    save_checkpoint(packed, tmp_path / "again.safetensors")
    assert len({read_metadata(file)[CHECKSUM] for file in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "grouped"])
def test_integer_products_need_no_correction(name, relative):
    layer, x = layer_of(name)
    wanted = expected_output(name, layer, x, TAU)
    layer.pack()
    layer.packed.multiplies_integers = True
    assert relative(quantized(layer, x), wanted) < SUM_TOLERANCE


def test_released_weights_compute_the_same(scaled, held_out, run_quantized):
    qnn = scaled()
    wanted = run_quantized(qnn, held_out)
    qnn.release_float_weights()
    assert torch.equal(run_quantized(qnn, held_out), wanted)


def test_modulation_scales_differences_alike(scaled, held_out, relative):
    """o + W·Q(x − â) with 8 bits stays near the float network over a trajectory."""
    qnn = scaled(weight_bits=8, modulate=True, act_dynamic=True)
    x, t = held_out[0][:4], held_out[1][:4]
    with torch.no_grad(), qnn.quantized(), qnn.trajectory():
        steps = [qnn(x * (1 + 0.05 * i), t) for i in range(4)]
    for i, found in enumerate(steps):
        assert relative(found, qnn(x * (1 + 0.05 * i), t)) < 0.05


def test_the_journal_gives_units_back_with_their_scales(scaled, wrap, tmp_path):
    journal = CalibrationJournal(tmp_path, {"seed": 1})
    source, target = scaled().model.up[0].block[0], wrap(**W4A8).model.up[0].block[0]
    journal.record("weights", 0, source, {"source": 0.5})
    assert journal.restore("weights", 0, target) == {"source": 0.5}
    for one, other in zip(source.modules(), target.modules(), strict=True):
        if isinstance(one, QuantModule):
            assert torch.equal(one.input_scale, other.input_scale) and torch.equal(one.weight_int, other.weight_int)
    plain = wrap(**W4A8).model.up[0].block[0]
    journal.record("weights", 1, plain, {})
    assert journal.restore("weights", 1, target) == {} and not scaled_layers(target)


@pytest.mark.slow
def test_scales_are_counted(scaled, calibrated):
    one, other = (account(qnn, (1, 8, 8)) for qnn in (scaled(), calibrated(**W4A8)))
    channels = sum(layer.in_channels for layer in scaled().layers().values())
    assert one.size_bytes - other.size_bytes == 4 * channels
    assert one.bops == other.bops


@pytest.mark.slow
def test_formats_without_a_place_for_scales_refuse_them(scaled, tmp_path):
    with pytest.raises(UserError, match="has no factors of input channels"):
        save_checkpoint(scaled(), tmp_path / "q.pth", format="published")
    with pytest.raises(UserError, match="for which Other has no place"):
        plan_weights(scaled(), "Other", lambda layer: None, WriteOptions())
    assert not list(tmp_path.iterdir())


def test_in_float64_it_is_exact(scaled, held_out, run_quantized):
    qnn: QuantModel = scaled().double()
    given = (held_out[0].double(), held_out[1])
    assert run_quantized(qnn, given).dtype is torch.float64
