"""Folders for diffusers' ``nunchaku_lite``, loaded by diffusers itself without its CUDA kernels."""

from __future__ import annotations

import json

import pytest
import torch
from linear_networks import LinearNetwork, random_weights, weight_in_double
from safetensors.torch import load_file
from torch import nn

from qdiff.deploy.nunchaku_lite import check_nunchaku_lite, write_nunchaku_lite
from qdiff.deploy.weight_format import WriteOptions
from qdiff.errors import UserError

pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers_loader import decoded, read_layer, use_plain_kernels

LAYERS = ["first", "block.1", "joined"]


class DiffusersNetwork(ModelMixin, ConfigMixin):
    """`LinearNetwork` as a model of diffusers."""

    @register_to_config
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        for name, child in LinearNetwork().named_children():
            self.add_module(name, child)
        self.register_buffer("table", torch.arange(192) / 192)

    forward = LinearNetwork.forward


class Wide(ModelMixin, ConfigMixin):
    """A model of diffusers with a layer of so many output channels."""

    @register_to_config
    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.fits, self.layer = nn.Linear(64, 8), nn.Linear(64, channels)


def quantized(network=None, **config):
    return random_weights(network or DiffusersNetwork(heads=3), weight_bits=4, short_steps=True, **config)


def test_the_config_is_the_models_own(tmp_path):
    written = write_nunchaku_lite(quantized(), tmp_path / "made" / "transformer", WriteOptions(compute_dtype="float16"))
    assert [path.name for path in written.files] == ["diffusion_pytorch_model.safetensors", "config.json"]
    config = json.loads(written.files[1].read_text())
    assert config["_class_name"] == "DiffusersNetwork" and config["heads"] == 3
    assert config["quantization_config"] == {
        "quant_method": "nunchaku_lite",
        "compute_dtype": "float16",
        "awq_w4a16": {"precision": "int4", "group_size": 64, "targets": ["block.1", "first", "joined"]},
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_diffusers_expects_these_names_shapes_and_dtypes(dtype, tmp_path, monkeypatch):
    use_plain_kernels(monkeypatch)
    from diffusers.quantizers.auto import DiffusersAutoQuantizer

    options = WriteOptions(compute_dtype=str(dtype).removeprefix("torch."))
    weights, config = write_nunchaku_lite(quantized(), tmp_path, options).files
    quantizer = DiffusersAutoQuantizer.from_config(json.loads(config.read_text())["quantization_config"])
    assert quantizer.update_torch_dtype(None) == dtype
    with torch.device("meta"):
        expected = DiffusersNetwork().to(dtype)
    found = load_file(weights)
    quantizer._process_model_before_weight_loading(expected, state_dict=found)  # refuses missing and unexpected names
    described = {name: (t.shape, t.dtype) for name, t in expected.state_dict().items()}
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == described
    del found["first.bias"]
    with pytest.raises(ValueError, match=r"Missing keys: \['first.bias'\]"):
        quantizer._process_model_before_weight_loading(expected, state_dict=found)


@pytest.mark.parametrize("form", ["float", "released", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_words_state_this_networks_weights(form, name, tmp_path):
    """With symmetric ranges and steps of 8 bits nothing is rounded in bfloat16."""
    qnn = quantized(weight_symmetric=True)
    expected = weight_in_double(qnn, name)
    {"float": lambda: None, "released": qnn.release_float_weights, "packed": qnn.pack_weights}[form]()
    write_nunchaku_lite(qnn, tmp_path)
    assert torch.equal(decoded(read_layer(tmp_path, name)), expected)


def test_any_zero_point(tmp_path):
    """Rounding of the zero is all that can differ: 2⁻⁸ of it."""
    qnn = quantized()
    write_nunchaku_lite(qnn, tmp_path)
    for name, layer in qnn.layers().items():
        reach = torch.stack([q.delta * q.zero_point for q in layer.weight_quantizers]).amax(0).double()
        error = (decoded(read_layer(tmp_path, name)) - weight_in_double(qnn, name)).abs()
        assert (error <= 2.0**-8 * reach).all() and error.max() > 0


def test_diffusers_loads_the_folder_and_computes_the_same(tmp_path, monkeypatch):
    use_plain_kernels(monkeypatch)
    qnn = quantized(weight_symmetric=True)
    write_nunchaku_lite(qnn, tmp_path)
    loaded = DiffusersNetwork.from_pretrained(tmp_path)
    assert type(loaded.first).__name__ == "AWQW4A16Linear" and loaded.config.heads == 3
    x = torch.randn(5, 128, dtype=torch.float64)
    with qnn.bfloat16().double().quantized():  # what is not quantized is rounded as in the file
        assert (loaded.double()(x) - qnn(x)).abs().max() < 1e-9


@pytest.mark.parametrize("channels", [12, 4])
def test_the_kernel_computes_eight_rows_at_a_time(channels, tmp_path):
    sentence = rf"1 of 2 .* layer \({channels} output channels, not a multiple of 8\)"
    with pytest.raises(UserError, match=sentence):
        write_nunchaku_lite(quantized(Wide(channels)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    options = WriteOptions(linears="dequantized")
    written = write_nunchaku_lite(quantized(Wide(channels)), tmp_path / "out", options)
    assert list(written.encodings) == ["fits"] and list(written.dequantized) == ["layer"]
    assert load_file(written.files[0])["layer.weight"].shape == (channels, 64)


def test_what_the_folder_cannot_be(tmp_path):
    qnn = quantized()
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").touch()
    with pytest.raises(UserError, match=r"holds other files .*index.json.*; choose a new folder"):
        check_nunchaku_lite(qnn, tmp_path)
    with pytest.raises(UserError, match="is not a model of diffusers"):
        check_nunchaku_lite(random_weights(LinearNetwork(), weight_bits=4), tmp_path / "new")
    with pytest.raises(UserError, match="--compute_dtype is float32"):
        check_nunchaku_lite(qnn, tmp_path / "new", WriteOptions(compute_dtype="float32"))
    with pytest.raises(UserError, match=r"--prefix is model\., "):
        check_nunchaku_lite(qnn, tmp_path / "new", WriteOptions(prefix="model."))
    assert not (tmp_path / "new").exists()


def test_eight_bits_do_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"first \(8 bits, and awq_w4a16 has 4\)"):
        write_nunchaku_lite(random_weights(DiffusersNetwork()), tmp_path)
