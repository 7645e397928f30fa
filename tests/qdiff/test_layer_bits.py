"""Layers with widths of their own: which layers they are, and that files, exports and calibration keep them apart."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from stored_size import content_bytes

from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.run import CalibrationRun, init_weights
from qdiff.checkpoint import load_checkpoint, load_packed, save_checkpoint
from qdiff.config import LayerBits, QuantConfig
from qdiff.cost.account import account
from qdiff.errors import UserError
from qdiff.methods import eda_dm, gptq, linear, qdiffusion
from qdiff.quant_model import QuantModel

W4A8 = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True}
# Float weights, odd widths, a split layer, a float input, and both ends.
MIXED = {
    "first": "A16",
    "last": "W8A16",
    "mid.block_1.conv1": "W32",
    "mid.block_1.conv2": "W3A4",
    "mid.attn_1.q": "W2A32",
    "up.0.block.0.nin_shortcut": "W6A5",
}
IMAGE = (1, 8, 8)
SUM_TOLERANCE = 1e-9  # relative L2 of the output in float64, sums in another order


def widths(layer):
    return [q.bits for q in layer.weight_quantizers], [q.bits for q in layer.act_quantizers]


def test_every_layer_has_the_width_that_it_is_given(wrap):
    layers = wrap(**W4A8, layer_bits=MIXED).layers()
    assert widths(layers["conv_in"]) == ([4], [16]) and widths(layers["conv_out"]) == ([8], [16])
    assert widths(layers["mid.block_1.conv1"]) == ([], [8])
    assert widths(layers["mid.block_1.conv2"]) == ([3], [4])
    assert widths(layers["mid.attn_1.q"]) == ([2], [])
    assert widths(layers["up.0.block.0.nin_shortcut"]) == ([6, 6], [5, 5])
    assert widths(layers["mid.attn_1.k"]) == ([4], [8])


def test_attention_has_its_own_widths(wrap):
    operands = lambda qnn, name: [q.bits for q in qnn.model.get_submodule(name).children()]  # noqa: E731
    core = next(n for n, m in wrap(**W4A8).model.named_modules() if hasattr(m, "act_quantizer_q") and "mid" in n)
    qnn = wrap(**W4A8, layer_bits={core: "A6"})
    assert operands(qnn, core) == [6, 6, 6, 8]
    others = [n for n, m in qnn.model.named_modules() if hasattr(m, "act_quantizer_q") and n != core]
    assert others and all(operands(qnn, name) == [8, 8, 8, 8] for name in others)
    assert operands(wrap(**W4A8, layer_bits={core: "A32"}), core) == []
    assert operands(wrap(**W4A8, act_dynamic=True, layer_bits={core: "A7"}), core) == [7] * 4
    with pytest.raises(UserError, match=f"{core} W4, but attention has no weight"):
        wrap(**W4A8, layer_bits={core: "W4"})


def test_own_names_count_before_ends_and_both_before_keep_ends(wrap):
    given = {"last": "A16", "conv_in": "W5", "first": "W7"}
    layers = wrap(**W4A8, keep_ends=True, layer_bits=given).layers()
    assert widths(layers["conv_out"]) == ([8], [16])
    assert widths(layers["conv_in"]) == ([5], [8])
    dynamic = wrap(**W4A8, modulate=True, act_dynamic=True, layer_bits={"first": "A32", "last": "A6"}).layers()
    assert not dynamic["conv_in"].modulates and dynamic["conv_out"].modulates
    assert widths(dynamic["conv_in"]) == ([4], []) and widths(dynamic["conv_out"]) == ([4], [6])


@pytest.mark.parametrize(
    ("layer_bits", "says"),
    [
        ({"mid.block_1.conv9": "W8"}, r"mid.block_1.conv9, which is no layer of Model; .*mid.block_1.conv"),
        ({"conv_in": "W9"}, "width is 9"),
        ({"conv_in": "A1"}, "width is 1;"),
        ({"conv_in": "8"}, "width is '8'"),
        ({"conv_in": ""}, "width is ''"),
    ],
)
def test_what_cannot_be_is_one_sentence(layer_bits, says, wrap):
    with pytest.raises(UserError, match=says) as caught:
        wrap(**W4A8, layer_bits=layer_bits)
    assert "\n" not in str(caught.value)


def test_widths_of_what_is_not_quantized():
    with pytest.raises(UserError, match="a A8, but activations are not quantized; add --quant_act"):
        QuantConfig(4, layer_bits={"a": "A8"})
    with pytest.raises(UserError, match="a W8, but weights are not quantized"):
        QuantConfig(None, 8, layer_bits={"a": "W8"})
    assert QuantConfig(4, layer_bits={"a": "W32A32"}).of_layer("a", None).weight_bits is None


def test_ends_that_are_not_known():
    with pytest.raises(UserError, match="first and last layer of Sequential are not known"):
        QuantModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), QuantConfig(4, layer_bits={"first": "W8"}))


def test_config_is_a_value():
    one = QuantConfig(4, 8, layer_bits={"b": "w8a16", "a": LayerBits(3), "c": LayerBits()})
    assert one == QuantConfig(4, 8, layer_bits=(("a", LayerBits(3)), ("b", "W8A16"))) and len({one}) == 1
    assert one.to_dict()["layer_bits"] == {"a": "W3", "b": "W8A16"}
    assert QuantConfig.from_dict(one.to_dict()) == one
    assert "layer_bits" not in QuantConfig(4, 8).to_dict()  # files of networks without them stay as they were


RECIPES = {
    "linear": (linear, None),
    "qdiff": (qdiffusion, qdiffusion.QDiffusionConfig(iterations=2, act_iterations=2, batch_size=5)),
    "eda-dm": (eda_dm, eda_dm.EdaDmConfig(iterations=2, batch_size=5, layer_weight=0.5, start="gptq")),
    "gptq": (gptq, gptq.GptqConfig()),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_every_method_calibrates_saves_and_loads_them(method, wrap, data, held_out, run_quantized, tmp_path):
    module, recipe = RECIPES[method]
    qnn = wrap(**W4A8, layer_bits=MIXED)
    in_float = qnn.layers()["mid.block_1.conv1"].weight.clone()
    module.calibrate(qnn, data, recipe, CalibrationRun(show_progress=False))
    path = tmp_path / "q.safetensors"
    save_checkpoint(qnn, path)
    assert content_bytes(path) == account(qnn, IMAGE).size_bytes
    loaded = wrap(**W4A8, layer_bits=MIXED)
    load_checkpoint(loaded, path)
    out = run_quantized(qnn, held_out)
    assert torch.equal(run_quantized(loaded, held_out), out)
    assert torch.equal(loaded.layers()["mid.block_1.conv1"].weight, in_float)
    assert int(qnn.layers()["mid.attn_1.q"].weight_int.max()) <= 3 < int(qnn.layers()["conv_out"].weight_int.max())
    changed = loaded.layers()["conv_out"].weight_int.clone()  # planted: one level of one layer
    changed[0, 0, 0, 0] ^= 1
    loaded.layers()["conv_out"].set_weight_int(changed)
    assert not torch.equal(run_quantized(loaded, held_out), out)


@pytest.mark.slow
def test_packed_from_the_start_and_with_integer_products(
    calibrated, tiny_network, held_out, run_quantized, relative, tmp_path
):
    layer_bits = {**MIXED, "last": "W32A16"}
    qnn = calibrated(**W4A8, layer_bits=layer_bits)
    save_checkpoint(qnn, tmp_path / "q.safetensors")
    empty = copy.deepcopy(tiny_network).to("meta")
    packed = load_packed(empty, tmp_path / "q.safetensors")
    out = run_quantized(qnn, held_out)
    assert torch.equal(run_quantized(packed, held_out), out)
    save_checkpoint(packed, tmp_path / "again.safetensors")
    once, again = (load_file(tmp_path / f"{name}.safetensors") for name in ("q", "again"))
    assert once.keys() == again.keys() and all(torch.equal(once[name], again[name]) for name in once)
    held_out = held_out[0].double(), held_out[1]  # in float32, values on rounding edges fall to the other side
    out = run_quantized(qnn.double(), held_out)
    qnn.pack_weights(integer=True)
    assert relative(run_quantized(qnn, held_out), out) < SUM_TOLERANCE
    qnn.layers()["conv_out"].weight.mul_(1 + 10 * SUM_TOLERANCE)  # planted: a float weight that is not the file's
    assert relative(run_quantized(qnn, held_out), out) > SUM_TOLERANCE


def test_released_weights(calibrated, held_out, run_quantized):
    qnn = calibrated(**W4A8, layer_bits=MIXED)
    out = run_quantized(qnn, held_out)
    qnn.release_float_weights()
    assert torch.equal(run_quantized(qnn, held_out), out)


def test_in_double_precision_each_layer_is_its_own_formula(wrap, held_out):
    """The output of a layer of 3 bits is that of weights rounded by hand, in float64."""
    qnn = wrap(weight_bits=8, layer_bits={"conv_in": "W3"})
    qnn.double()
    init_weights(qnn)
    layer, x = qnn.layers()["conv_in"], held_out[0].double()
    with torch.no_grad(), qnn.quantized():
        found = layer(x)
    weight = layer.weight.detach().flatten(1)
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    errors = {}
    for bits in (3, 4):  # the other width is the planted error
        delta = (high - low) / (2**bits - 1)
        zero = (-low / delta).round()
        rounded = (((weight / delta).round() + zero).clamp(0, 2**bits - 1) - zero) * delta
        expected = torch.nn.functional.conv2d(x, rounded.view_as(layer.weight), layer.bias, padding=1)
        errors[bits] = float((found - expected).norm() / expected.norm())
    assert errors[3] < 1e-6 < errors[4]  # δ is kept in float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        (
            {"conv_out": "W8"},
            {},
            "8 bits for the weight of conv_out but this run has 4 bits; give --layer_bits .*q.safetensors",
        ),
        ({}, {"first": "A16"}, "8 bits for the input of conv_in but this run has 16 bits; leave out --layer_bits"),
        ({"last": "W32A16"}, {"last": "A16"}, "float for the weight of conv_out but"),
    ],
)
def test_a_file_of_other_widths_is_refused(there, here, says, calibrated, wrap, tmp_path):
    save_checkpoint(calibrated(**W4A8, layer_bits=there), tmp_path / "q.safetensors")
    other = wrap(**W4A8, layer_bits=here)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UserError, match=says):
        load_checkpoint(other, tmp_path / "q.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.slow
def test_the_same_widths_in_other_words(calibrated, wrap, held_out, run_quantized, tmp_path):
    qnn = calibrated(**W4A8, layer_bits={"first": "A16", "mid.attn_1.q": "W4"})
    save_checkpoint(qnn, tmp_path / "q.safetensors")
    other = wrap(**W4A8, layer_bits={"conv_in": "W4A16"})
    load_checkpoint(other, tmp_path / "q.safetensors")
    assert torch.equal(run_quantized(other, held_out), run_quantized(qnn, held_out))
    weights = wrap(**{**W4A8, "act_bits": None})  # the inputs' widths do not matter to the weights alone
    load_checkpoint(weights, tmp_path / "q.safetensors")
    assert torch.equal(run_quantized(weights, held_out), run_quantized(qnn, held_out, activations=False))


@pytest.mark.slow
def test_costs_are_of_each_layers_width(calibrated):
    plain, mixed = account(calibrated(**W4A8), IMAGE), account(calibrated(**W4A8, layer_bits=MIXED), IMAGE)
    before, after = ({c.name: c for c in counted.layers} for counted in (plain, mixed))
    last = after["conv_out"]
    assert last.bops == last.macs * 8 * 16 and before["conv_out"].bops == last.macs * 4 * 8
    conv1 = after["mid.block_1.conv1"]
    assert conv1.weight_bits == 32 and conv1.act_bits == 8
    assert {n for n in after if after[n] != before[n]} == {"conv_in", "conv_out", *list(MIXED)[2:]}


@pytest.mark.slow
def test_published_files_are_refused(calibrated, wrap, tmp_path):
    qnn = calibrated(**W4A8, layer_bits={"last": "W8"})
    with pytest.raises(UserError, match=r"one width for all layers \(last=W8 differ\); save the native format"):
        save_checkpoint(qnn, tmp_path / "q.pth", "published")
    save_checkpoint(calibrated(**W4A8), tmp_path / "q.pth", "published")
    with pytest.raises(UserError, match="leave out --layer_bits"):
        load_checkpoint(wrap(**W4A8, layer_bits={"last": "W8"}), tmp_path / "q.pth")


class Killed(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_calibration_goes_on(wrap, data, held_out, run_quantized, tmp_path, monkeypatch):
    recipe = qdiffusion.QDiffusionConfig(iterations=3, act_iterations=2, batch_size=5)

    def calibrate(folder):
        qnn = wrap(**W4A8, layer_bits=MIXED)
        journal = CalibrationJournal(folder, {"quant": qnn.config.to_dict()})
        qdiffusion.calibrate(qnn, data, recipe, CalibrationRun(seed=1, journal=journal, show_progress=False))
        return qnn

    whole = calibrate(tmp_path / "whole")
    recorded, record = [], CalibrationJournal.record

    def stopping(journal, *unit):
        record(journal, *unit)
        recorded.append(unit)
        if len(recorded) == 5:
            raise Killed

    monkeypatch.setattr(CalibrationJournal, "record", stopping)
    with pytest.raises(Killed):
        calibrate(tmp_path / "broken")
    monkeypatch.setattr(CalibrationJournal, "record", record)
    assert torch.equal(run_quantized(calibrate(tmp_path / "broken"), held_out), run_quantized(whole, held_out))
    with pytest.raises(UserError, match="other settings"):
        CalibrationJournal(tmp_path / "broken", {"quant": QuantConfig(**W4A8, layer_bits={"last": "W8"}).to_dict()})


@pytest.mark.slow
def test_on_a_gpu_it_never_waits(cuda, calibrated, held_out, tmp_path, wrap):
    qnn = calibrated(**W4A8, layer_bits=MIXED)
    save_checkpoint(qnn, tmp_path / "q.safetensors")
    on_gpu = wrap(**W4A8, layer_bits=MIXED).to("cuda")
    load_checkpoint(on_gpu, tmp_path / "q.safetensors")
    given = tuple(part.to("cuda") for part in held_out)
    with torch.no_grad(), on_gpu.quantized(), qnn.quantized():
        with cuda.counting() as counts:
            out = on_gpu(*given)
        assert counts.waits == []
        expected = qnn(*held_out)
    assert float((out.cpu() - expected).norm() / expected.norm()) < 0.1
