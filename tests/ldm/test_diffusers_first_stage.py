"""The first stages as VQModel and AutoencoderKL of diffusers: the same images and latents, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from ldm.config import load_config
from ldm.diffusers_first_stage import FREE, KL, VQ, first_stage_config, first_stage_section
from ldm.diffusers_layout import first_stage_layout
from ldm.util import instantiate_from_config
from qdiff.errors import UserError
from qdiff.io.diffusers_files import check_same_config, complete_config, component_of

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-9  # relative L2 in float64
CASES = {
    "vq": ("vq", {}, {}),
    "vq, attention in the levels": ("vq", {"attn_resolutions": [16, 4], "num_res_blocks": 2}, {}),
    "vq, another width of entries": ("vq", {"z_channels": 5}, {}),
    "kl": ("kl", {}, {}),
    "kl, attention in the levels": ("kl", {"attn_resolutions": [8], "ch_mult": [1, 2, 3]}, {}),
}


@pytest.fixture(params=CASES)
def section(request, first_stages):
    kind, ddconfig, params = CASES[request.param]
    made = copy.deepcopy(first_stages[kind])
    made["params"] |= params
    made["params"]["ddconfig"] |= ddconfig
    return made


@pytest.fixture
def ours(section, fill):
    return fill(instantiate_from_config(section)).double().eval()


@pytest.fixture
def theirs(section, ours):
    kind, config = first_stage_config(section, "x")
    return component_of(getattr(diffusers, kind), config, first_stage_layout(ours), ours, "x")


@torch.no_grad()
def test_the_same_latents_and_images(ours, theirs, relative):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    if isinstance(theirs, diffusers.VQModel):
        latents, encoded = ours.encode(images), theirs.encode(images).latents
    else:
        posterior, other = ours.encode(images), theirs.encode(images).latent_dist
        latents, encoded = posterior.mean, other.mean
        assert relative(other.logvar, posterior.log_variance) < TOLERANCE
    assert relative(encoded, latents) < TOLERANCE
    expected = ours.decode(latents)
    assert relative(theirs.decode(latents).sample, expected) < TOLERANCE
    # Planted: two convolutions of the decoder exchanged.
    block = theirs.decoder.mid_block.resnets[0]
    block.conv1, block.conv2 = block.conv2, block.conv1
    assert relative(theirs.decode(latents).sample, expected) > TOLERANCE


def test_there_and_back(section, ours, theirs):
    back = first_stage_layout(ours).to_ours(theirs.state_dict(), ours.state_dict(), "x")
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, back[name]) for name, value in ours.state_dict().items())
    kind = type(theirs)
    config = complete_config(kind, dict(theirs.config))
    again = first_stage_section(kind.__name__, config, "x")
    assert again == section
    check_same_config(config, complete_config(kind, first_stage_config(again, "x")[1]), FREE, "x")


def test_each_layer_has_its_partner(ours, theirs):
    named = [name for pair in first_stage_layout(ours).layers for name in pair.theirs]
    assert sorted(named) == sorted({name.rpartition(".")[0] for name in theirs.state_dict()})


@pytest.mark.parametrize(
    "name", ["latent-diffusion/cin256-v2", "latent-diffusion/lsun_churches-ldm-kl-8", "stable-diffusion/v1-inference"]
)
def test_the_shipped_configs(name):
    section = load_config(f"configs/{name}.yaml").model.params.first_stage_config
    kind, config = first_stage_config(section, name)
    with torch.device("meta"):
        ours, theirs = instantiate_from_config(section), getattr(diffusers, kind)(**config)
        made = first_stage_layout(ours).to_theirs(ours.state_dict(), theirs.state_dict(), name)
    assert made.keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(
    ("kind", "ddconfig", "match"),
    [
        ("vq", {"double_z": True}, f"x has a first stage with double_z true, unlike any {VQ} of diffusers"),
        ("kl", {"z_channels": 3}, f"another embed_dim than z_channels, unlike any {KL} of diffusers"),
        ("kl", {"ch_mult": [2, 2]}, "a ch_mult that does not begin with 1"),
    ],
)
def test_networks_that_the_class_cannot_express(kind, ddconfig, match, first_stages):
    section = copy.deepcopy(first_stages[kind])
    section["params"]["ddconfig"] |= ddconfig
    with pytest.raises(UserError, match=match):
        first_stage_config(section, "x")
    with pytest.raises(UserError, match=r"x has block_out_channels \[32, 48\]; give multiples of the first width"):
        first_stage_section(KL, {"block_out_channels": [32, 48]}, "x")
