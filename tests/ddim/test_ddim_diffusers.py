"""The DDPM UNet as diffusers' UNet2DModel: the same ε both ways, the same weights to the bit, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from exact_time import ExactTime
from omegaconf import OmegaConf
from torch import nn

from ddim.config import load_config
from ddim.diffusers_folder import FREE, read_pipeline, write_pipeline
from ddim.diffusers_layout import UNET, config_sections, unet_config, unet_layout
from ddim.models.diffusion import Model
from ddim.models.layers import timestep_embedding
from ddim.pipeline import DdimPipeline
from qdiff.errors import UserError
from qdiff.interface import AttentionCore
from qdiff.io.diffusers_files import check_same_config, complete_config, component_of

diffusers = pytest.importorskip("diffusers")

# Relative L2 in float64. In float32 a random network's rounding alone is 2e-6; the trained ones are compared to 1e-6 in
# tests/scripts/test_convert.py.
TOLERANCE = 1e-9
SHAPES = {
    "one level": {"ch_mult": [1], "attn_resolutions": [16]},
    "no attention": {"ch_mult": [1, 2], "attn_resolutions": [16]},
    "attention": {"ch_mult": [1, 2, 3], "attn_resolutions": [8, 2], "num_res_blocks": 2},
}


@pytest.fixture(params=SHAPES)
def config(request, tiny_config):
    # Two channels per norm group: with one, the norm would remove what the time embedding adds.
    tiny_config.model.update({"ch": 64, **SHAPES[request.param]})
    return tiny_config


@pytest.fixture
def ours(config):
    torch.manual_seed(0)
    network = Model(config).eval()
    for parameter in network.parameters():
        if parameter.dim() == 1:  # norms and biases, which would hide an exchange of two
            nn.init.normal_(parameter, 0.5, 0.3)
    return network


def theirs_of(config, network):
    return component_of(diffusers.UNet2DModel, unet_config(config, "x"), unet_layout(network), network, "x")


def error(out, expected) -> float:
    return float((out - expected).norm() / expected.norm())


@torch.no_grad()
def test_the_same_noise(config, ours):
    ours, x, t = ours.double(), torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 999])
    theirs = theirs_of(config, ours)
    plain = theirs.time_proj
    theirs.time_proj = ExactTime(timestep_embedding, ours.ch)
    expected = ours(x, t)
    assert error(theirs(x, t).sample, expected) < TOLERANCE
    # Planted: the library's own time embedding, which is the same but for its precision.
    theirs.time_proj = plain
    assert TOLERANCE < error(theirs(x, t).sample, expected) < 1e-4


def test_there_and_back(config, ours):
    layout, theirs = unet_layout(ours), theirs_of(config, ours)
    back = layout.to_ours(theirs.state_dict(), ours.state_dict(), "x")
    assert all(torch.equal(value, back[name]) for name, value in ours.state_dict().items())
    made = complete_config(diffusers.UNet2DModel, dict(theirs.config))
    sections = OmegaConf.create(config_sections(made, "x"))
    check_same_config(made, complete_config(diffusers.UNet2DModel, unet_config(sections, "x")), FREE, "x")
    assert Model(sections).state_dict().keys() == back.keys()


def test_each_layer_and_attention_has_its_partner(config, ours):
    layout, theirs = unet_layout(ours), theirs_of(config, ours)
    named = [name for pair in layout.layers for name in pair.theirs]
    assert sorted(named) == sorted({name.rpartition(".")[0] for name in theirs.state_dict()})
    cores = {name for name, module in ours.named_modules() if isinstance(module, AttentionCore)}
    attentions = {name for name, module in theirs.named_modules() if hasattr(module, "to_q")}
    assert layout.attentions.keys() == cores and set(layout.attentions.values()) == attentions
    assert all(pair.rows is None for pair in layout.layers)


@pytest.mark.parametrize("path", ["configs/cifar10.yml", "configs/digits.yml"])
def test_the_shipped_configs(path):
    config = load_config(path)
    with torch.device("meta"):
        network, theirs = Model(config), diffusers.UNet2DModel(**unet_config(config, path))
        layout = unet_layout(network)
        made = layout.to_theirs(network.state_dict(), theirs.state_dict(), path)
    assert made.keys() == theirs.state_dict().keys()


def test_networks_that_the_class_cannot_express(tiny_config):
    for change, match in (
        ({"resamp_with_conv": False}, "x has model.resamp_with_conv false, which diffusers' UNet2DModel cannot do"),
        ({"ch_mult": [2, 2]}, r"x has model\.ch_mult \[2, 2\], but the first level of diffusers'"),
    ):
        config = copy.deepcopy(tiny_config)
        config.model.update(change)
        with pytest.raises(UserError, match=match):
            unet_config(config, "x")


@pytest.fixture
def pipeline(tiny_config, tmp_path):
    """A pipeline of ours on disk, with weights."""
    OmegaConf.save(tiny_config, tmp_path / "tiny.yml")
    torch.save(Model(tiny_config).state_dict(), tmp_path / "tiny.pth")
    return DdimPipeline(tmp_path / "tiny.yml", tmp_path / "tiny.pth")


def test_other_images_are_refused_before_loading(pipeline, tmp_path):
    pipeline.model_config.data.rescaled = False
    with pytest.raises(UserError, match=r"the config tiny has data\.rescaled false"):
        write_pipeline(pipeline, tmp_path / "out")
    assert not hasattr(pipeline, "network") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"act_fn": "gelu"}, r'config\.json has act_fn "gelu", where a network of the papers has "silu"; only'),
        ({"flip_sin_to_cos": True}, "has flip_sin_to_cos true, where a network of the papers has false"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "has up_block_types"),
        ({"block_out_channels": [32, 48]}, r"has block_out_channels \[32, 48\]; give multiples of the first width"),
        ({"sample_size": [8, 4]}, r"has sample_size \[8, 4\]; give a network for square images"),
        ({"_class_name": "UNet1DModel"}, f"is the config of a UNet1DModel; the networks of the papers are {UNET}"),
        ({"layers_per_block": 2}, "does not hold the weights of this config's network: .* missing"),
    ],
)
def test_folders_of_other_networks(pipeline, tmp_path, change, match):
    write_pipeline(pipeline, tmp_path / "there")
    path = tmp_path / "there" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=match):
        read_pipeline(tmp_path / "there", tmp_path / "back" / "model.safetensors")
    assert not (tmp_path / "back").exists()


def test_schedule_and_predictions_come_back(pipeline, tmp_path):
    changed = {"beta_schedule": "sigmoid", "parameterization": "v", "num_diffusion_timesteps": 100}
    pipeline.model_config.diffusion.update(changed)
    write_pipeline(pipeline, tmp_path / "there")
    read_pipeline(tmp_path / "there", tmp_path / "back" / "model.safetensors")
    back = load_config(tmp_path / "back" / "config.yaml")
    assert {name: back.diffusion[name] for name in changed} == changed
    assert (back.diffusion.beta_start, back.diffusion.beta_end) == (0.0001, 0.02)
