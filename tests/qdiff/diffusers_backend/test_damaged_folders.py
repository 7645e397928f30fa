"""Folders that cannot be loaded: each says what is wrong and what to do."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from safetensors.torch import load_file, save_file
from tiny_models import dit

from qdiff.diffusers_backend.config import FORMAT_VERSION
from qdiff.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(quantized_folder, tmp_path):
    """A quantized UNet's folder to be changed."""
    return shutil.copytree(quantized_folder / "unet", tmp_path / "unet")


def change(folder, edit):
    """Edit config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def refused(folder, message, error=UserError):
    with pytest.raises(error, match=message) as raised:
        diffusers.UNet2DModel.from_pretrained(folder)
    assert error is not UserError or "\n" not in str(raised.value)


def test_it_loads_as_it_is(folder):
    assert diffusers.UNet2DModel.from_pretrained(folder).is_quantized


@pytest.mark.parametrize(
    ("version", "fix"), [(FORMAT_VERSION + 1, "update qdiff"), (FORMAT_VERSION - 1, "quantize the pipeline again")]
)
def test_another_format_version(folder, version, fix):
    """Whatever else it has that is not known."""
    change(folder, lambda config: config["quantization_config"].update(format_version=version, of_tomorrow=1))
    refused(folder, f"format version {version}, and this qdiff reads {FORMAT_VERSION}; {fix}")


def test_unknown_keys_and_widths(folder):
    change(folder, lambda config: config["quantization_config"].update(colour="red"))
    refused(folder, r"unknown keys \(colour\); give weight_bits, act_bits")
    change(folder, lambda config: (config["quantization_config"].pop("colour"),))
    change(folder, lambda config: config["quantization_config"].update(weight_bits=9))
    refused(folder, "weight_bits is 9")


def test_missing_tensors(folder):
    state = load_file(folder / WEIGHTS)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("mid_block.attentions")}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, rf"{len(state) - len(kept)} tensors of this UNet2DModel are missing .* with all its shards")


def test_a_missing_shard(quantized_folder, tmp_path):
    network = diffusers.UNet2DModel.from_pretrained(quantized_folder / "unet")
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert diffusers.UNet2DModel.from_pretrained(tmp_path).is_quantized
    shards[0].unlink()
    refused(tmp_path, f"does not appear to have a file named .*{shards[0].name}", FileNotFoundError)


def test_another_models_config(folder):
    change(folder, lambda config: config.update(block_out_channels=[8, 32]))
    refused(folder, r"has the shape \(.*\) in the files and is of shape \(.*\) in the network .* mixes two models")


def test_a_config_with_fewer_layers(folder):
    def edit(config):
        del config["quantization_config"]["attention"]["up_blocks.0.attentions.1"]
        config["up_block_types"] = ["UpBlock2D", "UpBlock2D"]

    change(folder, edit)
    refused(folder, r"UNet2DModel has no module up_blocks\.0\.attentions\.0 that its quantization_config names")


def test_tensors_that_the_network_does_not_have(folder):
    state = load_file(folder / WEIGHTS)
    save_file({**state, "conv_in.more": torch.zeros(2)}, folder / WEIGHTS, metadata={"format": "pt"})
    refused(folder, r"conv_in\.more has the shape \(2,\) in the files and is not there in the network")


def test_the_config_of_another_class(folder, tmp_path):
    dit().save_pretrained(tmp_path / "dit")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    change(tmp_path / "dit", lambda config: config.update(quantization_config=quantization))
    with pytest.raises(UserError, match=r"DiTTransformer2DModel has no module .* that its quantization_config names"):
        diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "dit")


def test_without_accelerate(folder, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "accelerate" else find(name, *a))
    refused(folder, r'loaded with accelerate; run pip install "qdiff\[diffusers\]"')
