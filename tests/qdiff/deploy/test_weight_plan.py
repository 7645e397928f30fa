"""What becomes of each layer of a network in a file of weights, and what the result says."""

from __future__ import annotations

import pytest
import torch
from linear_networks import LinearNetwork, MisfitNetwork, random_weights, weight_in_double
from safetensors.torch import load_file
from torch import nn

from qdiff.config import QuantConfig
from qdiff.deploy.comfyui import check_comfyui, write_comfyui
from qdiff.deploy.weight_format import WriteOptions
from qdiff.deploy.weight_formats import FORMATS
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel

EXACT = WriteOptions(compute_dtype="float32")
DEQUANTIZED = WriteOptions(compute_dtype="float32", convolutions="dequantized", linears="dequantized")


def test_the_table_of_formats():
    assert list(FORMATS) == ["comfyui", "nunchaku_lite"]
    for name, row in FORMATS.items():
        assert row.name == name and row.title


@pytest.mark.parametrize("form", ["float", "released", "packed"])
def test_layers_that_do_not_fit_are_dequantized_if_asked(form, tmp_path):
    qnn = random_weights(MisfitNetwork(), weight_bits=4)
    expected = {name: weight_in_double(qnn, name) for name in ("convolution", "odd", "joined")}
    {"float": lambda: None, "released": qnn.release_float_weights, "packed": qnn.pack_weights}[form]()
    written = write_comfyui(qnn, tmp_path / "net.safetensors", DEQUANTIZED)
    assert written.encodings == {"fits": "awq_w4a16"}
    assert written.dequantized == {
        "convolution": "a convolution",
        "odd": "100 input channels, not a multiple of 64",
        "joined": "split at input channel 32, not a multiple of 64",
    }
    assert "3 quantized layers are stored as floats, dequantized: convolution (a convolution); odd" in written.notes[1]
    tensors = load_file(written.files[0])
    for name, weight in expected.items():
        assert torch.equal(tensors[f"{name}.weight"], weight.float())  # δ·(q − z), rounded once


def test_one_kind_of_layer_may_be_dequantized_alone(tmp_path):
    qnn = random_weights(MisfitNetwork(), weight_bits=4)
    with pytest.raises(UserError, match=r"^2 of 4 .* odd .* joined .*; give --linears dequantized to store"):
        check_comfyui(qnn, tmp_path / "net.safetensors", WriteOptions(convolutions="dequantized"))
    with pytest.raises(UserError, match=r"^1 of 4 .* convolution .*; give --convolutions dequantized to store"):
        check_comfyui(qnn, tmp_path / "net.safetensors", WriteOptions(linears="dequantized"))
    check_comfyui(qnn, tmp_path / "net.safetensors", DEQUANTIZED)
    assert not any(tmp_path.iterdir())


def test_something_must_fit(tmp_path):
    qnn = random_weights(nn.Sequential(nn.Conv2d(3, 3, 1)), weight_bits=4)
    with pytest.raises(UserError, match=r"no layer fits comfyui: 0 \(a convolution\); use another --format"):
        write_comfyui(qnn, tmp_path / "net.safetensors", DEQUANTIZED)


def test_named_layers_are_stored_as_floats(tmp_path):
    qnn = random_weights(LinearNetwork(), weight_bits=4)
    options = WriteOptions(compute_dtype="float32", as_floats=("first",))
    written = write_comfyui(qnn, tmp_path / "net.safetensors", options)
    assert sorted(written.encodings) == ["block.1", "joined"]
    assert written.dequantized == {"first": "in --as_floats"}
    weight = load_file(written.files[0])["first.weight"]
    assert torch.equal(weight, weight_in_double(qnn, "first").float())
    with pytest.raises(UserError, match="--as_floats names nowhere, which is not a quantized layer"):
        check_comfyui(qnn, tmp_path / "net.safetensors", WriteOptions(as_floats=("nowhere",)))


def test_layers_that_stay_in_float_are_written_as_they_are(tmp_path):
    network = nn.ModuleDict({"of_its_own": nn.MultiheadAttention(8, 2), "fits": nn.Linear(64, 8)})
    qnn = random_weights(network, weight_bits=4)
    assert list(qnn.left_in_float) == ["of_its_own"]
    tensors = load_file(write_comfyui(qnn, tmp_path / "net.safetensors", EXACT).files[0])
    for name, value in network["of_its_own"].state_dict().items():
        assert torch.equal(tensors[f"of_its_own.{name}"], value)


def test_a_layer_in_two_places_is_stored_twice(tmp_path):
    shared = nn.Linear(64, 64)
    qnn = random_weights(nn.ModuleDict({"one": shared, "other": shared, "norm": nn.LayerNorm(64)}), weight_bits=4)
    written = write_comfyui(qnn, tmp_path / "net.safetensors")
    assert sorted(written.encodings) == ["one", "other"]
    tensors = load_file(written.files[0])
    assert torch.equal(tensors["one.weight"], tensors["other.weight"])
    assert torch.equal(tensors["one.bias"], tensors["other.bias"])


def test_quantized_activations_are_said_to_be_left_out(tmp_path):
    qnn = random_weights(LinearNetwork(), weight_bits=4, act_bits=8)
    notes = write_comfyui(qnn, tmp_path / "net.safetensors").notes
    assert notes[0] == "3 layers are awq_w4a16: their inputs stay in float"
    assert notes[1] == "the quantization of activations is not in the file (4 quantizers)"
    assert not any("quantizer" in name for name in load_file(tmp_path / "net.safetensors"))
    assert len(write_comfyui(random_weights(LinearNetwork(), weight_bits=4), tmp_path / "net.safetensors").notes) == 1


@pytest.mark.parametrize("name", ["first.bias", "block.0.weight", "table"])
def test_values_outside_the_compute_dtype(name, tmp_path):
    qnn = random_weights(LinearNetwork(), weight_bits=4)
    path, _, last = name.rpartition(".")
    with torch.no_grad():
        getattr(qnn.model.get_submodule(path), last)[0] = 70_000
    with pytest.raises(UserError, match=f"^{name} has values that are not finite in float16; give another"):
        write_comfyui(qnn, tmp_path / "net.safetensors", WriteOptions(compute_dtype="float16"))
    assert not any(tmp_path.iterdir())
    write_comfyui(qnn, tmp_path / "net.safetensors")  # bfloat16 reaches as far as float32


def test_weights_without_a_width_or_ranges(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(UserError, match="the weights of this network have no width"):
        write_comfyui(QuantModel(LinearNetwork(), QuantConfig(weight_bits=None, act_bits=8)), path)
    with pytest.raises(UserError, match=r"weight quantizer first\.weight_quantizers\.0 has no range"):
        write_comfyui(QuantModel(LinearNetwork(), QuantConfig(weight_bits=4)), path)
    assert not path.exists()


def test_options_are_checked_when_they_are_made():
    with pytest.raises(UserError, match="--compute_dtype is float64; give it one of bfloat16, float16, float32"):
        WriteOptions(compute_dtype="float64")
    with pytest.raises(UserError, match="--convolutions is kept; give it one of refused, dequantized"):
        WriteOptions(convolutions="kept")


def test_writing_changes_nothing(tmp_path):
    qnn = random_weights(LinearNetwork(), weight_bits=4)
    before = {name: value.clone() for name, value in qnn.state_dict().items()}
    write_comfyui(qnn, tmp_path / "net.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in qnn.state_dict().items())
    assert {layer.form.name for layer in qnn.layers().values()} == {"FLOAT"}
