"""The latent UNet as networks of diffusers: the same ε both ways, the same weights to the bit, and what is refused."""

from __future__ import annotations

import pytest
import torch
from exact_time import ExactTime

from ldm.config import load_config
from ldm.diffusers_layout import unet_layout
from ldm.diffusers_unet import (
    CONDITIONAL,
    FREE,
    NARROW,
    PLAIN,
    diffusers_class,
    plain_config,
    unet_config,
    unet_params,
)
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.util import instantiate_from_config
from qdiff.errors import UserError
from qdiff.interface import AttentionCore
from qdiff.io.diffusers_files import check_same_config, complete_config, component_of

pytest.importorskip("diffusers")

# Relative L2 in float64; the trained networks are compared in float32 in tests/scripts/test_convert.py.
TOLERANCE = 1e-9
SIZE = 8
TWO = {"channel_mult": [1, 2], "attention_resolutions": [1, 2]}
# Released architecture, changes, class in diffusers.
CASES = {
    "bedroom": ("bedroom", {"num_res_blocks": 2}, PLAIN),
    "bedroom, heads of one width": ("bedroom", TWO, PLAIN),
    "bedroom, one head": ("bedroom", {**TWO, "num_head_channels": -1, "num_heads": 1}, PLAIN),
    "bedroom, new order": ("bedroom", {"use_new_attention_order": True}, PLAIN),
    "bedroom, narrow stem": ("bedroom", {"channel_mult": [2, 3]}, NARROW),
    "church": ("church", {}, PLAIN),
    "church, no attention": ("church", {"attention_resolutions": []}, PLAIN),
    "church, heads of two widths": ("church", TWO, NARROW),
    "church, narrow stem": ("church", {**TWO, "channel_mult": [2, 1]}, NARROW),
    "imagenet": ("imagenet", TWO, CONDITIONAL),
    "sd": ("sd", {"transformer_depth": 2}, CONDITIONAL),
    "sd, heads of one width": ("sd", {**TWO, "num_heads": -1, "num_head_channels": 16}, CONDITIONAL),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def ours(case, make_unet):
    return make_unet(case[0], **case[1]).double()


@pytest.fixture
def arguments(ours, case, unet_arguments):
    """The arguments of our network."""
    return unet_arguments(case[0], **case[1])


@pytest.fixture
def theirs(ours, arguments, case):
    kind, config = unet_config(arguments, SIZE, "x")
    assert kind == case[2]
    made = component_of(diffusers_class(kind), config, unet_layout(ours), ours, "x")
    made.time_proj = ExactTime(timestep_embedding, ours.model_channels)
    return made


def predicted(theirs, x, t, *context):
    return theirs(x, t, *context).sample


@pytest.fixture
def batch(ours, unet_inputs):
    x, t, *context = unet_inputs(ours)
    return x.double(), t, *(value.double() for value in context)


@torch.no_grad()
def test_the_same_noise(ours, theirs, batch, relative):
    expected = ours(*batch)
    assert relative(predicted(theirs, *batch), expected) < TOLERANCE
    # Planted: q and v of an attention exchanged, which have one shape.
    attention = next(module for module in theirs.modules() if hasattr(module, "to_q"))
    attention.to_q, attention.to_v = attention.to_v, attention.to_q
    assert relative(predicted(theirs, *batch), expected) > TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_there_and_back(ours, theirs, arguments, batch, case, relative):
    layout, state = unet_layout(ours), ours.state_dict()
    back = layout.to_ours(theirs.state_dict(), state, "x")
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    kind = diffusers_class(case[2])
    config = plain_config(complete_config(kind, dict(theirs.config)))
    params = unet_params(case[2], config, "x")
    again = plain_config(complete_config(kind, unet_config(params, SIZE, "x")[1]))
    check_same_config(config, again, FREE, "x")
    # From what a folder has, without our network: another order of qkv is then the released one.
    made = UNetModel(**params).double().eval()
    made.load_state_dict(unet_layout(made).to_ours(theirs.state_dict(), made.state_dict(), "x"))
    assert relative(made(*batch), ours(*batch)) < TOLERANCE


def test_each_layer_and_attention_has_its_partner(ours, theirs):
    layout = unet_layout(ours)
    named = [name for pair in layout.layers for name in pair.theirs]
    assert sorted(named) == sorted({name.rpartition(".")[0] for name in theirs.state_dict()})
    cores = {name for name, module in ours.named_modules() if isinstance(module, AttentionCore)}
    attentions = {name for name, module in theirs.named_modules() if hasattr(module, "to_q")}
    assert layout.attentions.keys() == cores and set(layout.attentions.values()) == attentions
    for pair in layout.layers:
        if pair.rows is not None:
            assert pair.ours.endswith(".qkv") and [n.rpartition(".")[2] for n in pair.theirs] == [
                "to_q",
                "to_k",
                "to_v",
            ]
            rows = torch.cat(pair.rows).sort().values
            assert torch.equal(rows, torch.arange(ours.get_submodule(pair.ours).out_channels))


def test_the_stock_time_embedding_is_ours():
    from diffusers.models.embeddings import Timesteps

    t = torch.arange(1000)
    for dim in (32, 192, 224, 320):  # also of the released models
        assert torch.equal(Timesteps(dim, True, 0)(t), timestep_embedding(t, dim, torch.float32))


@torch.no_grad()
def test_linear_projections_are_1x1_convolutions(make_unet, unet_arguments, unet_inputs, relative):
    """Stable Diffusion 2 has them."""
    ours = make_unet("sd").double()
    kind, config = unet_config(unet_arguments("sd"), SIZE, "x")
    config["use_linear_projection"] = True
    theirs = component_of(diffusers_class(kind), config, unet_layout(ours), ours, "x")
    assert "use_linear_projection" in FREE and theirs.mid_block.attentions[0].proj_in.weight.dim() == 2
    theirs.time_proj = ExactTime(timestep_embedding, ours.model_channels)
    x, t, context = unet_inputs(ours)
    assert relative(theirs(x.double(), t, context.double()).sample, ours(x.double(), t, context.double())) < TOLERANCE


CONFIGS = {
    "latent-diffusion/celebahq-ldm-vq-4": PLAIN,
    "latent-diffusion/cin256-v2": CONDITIONAL,
    "latent-diffusion/ffhq-ldm-vq-4": PLAIN,
    "latent-diffusion/lsun_bedrooms-ldm-vq-4": PLAIN,
    "latent-diffusion/lsun_churches-ldm-kl-8": NARROW,
    "stable-diffusion/v1-inference": CONDITIONAL,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shipped_configs(name):
    section = load_config(f"configs/{name}.yaml").model.params.unet_config
    kind, config = unet_config(section.params, 64, name)
    assert kind == CONFIGS[name]
    with torch.device("meta"):
        ours, theirs = instantiate_from_config(section), diffusers_class(kind)(**config)
        made = unet_layout(ours).to_theirs(ours.state_dict(), theirs.state_dict(), name)
    assert made.keys() == theirs.state_dict().keys()


def test_a_config_of_stable_diffusion_2():
    """One number of heads per level, linear projections, and arguments that are left out."""
    given = {
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "sample_size": 64,
        "upcast_attention": True,
        "use_linear_projection": True,
    }
    kind = diffusers_class(CONDITIONAL)
    config = plain_config(complete_config(kind, given))
    params = unet_params(CONDITIONAL, config, "x")
    assert (params["num_head_channels"], params["attention_resolutions"]) == (64, [1, 2, 4])
    check_same_config(config, plain_config(complete_config(kind, unet_config(params, 64, "x")[1])), FREE, "x")


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("bedroom", {"conv_resample": False}, "x has conv_resample false, which no network of diffusers can do"),
        ("church", {"num_heads_upsample": 2}, "x has num_heads_upsample, which"),
        ("sd", {"resblock_updown": True}, "x has resblock_updown and use_spatial_transformer together"),
        ("sd", {"channel_mult": [2, 2]}, "x has use_spatial_transformer and a channel_mult that does not begin with 1"),
    ],
)
def test_networks_that_no_class_can_express(kind, changes, match, unet_arguments):
    with pytest.raises(UserError, match=match):
        unet_config(unet_arguments(kind, **changes), SIZE, "x")


def test_configs_of_other_networks(unet_arguments):
    kind, config = unet_config(unet_arguments("sd"), SIZE, "x")
    complete = complete_config(diffusers_class(kind), config)
    for change, match in (
        (
            {"attention_head_dim": [2, 8]},
            r"x has attention_head_dim \[2, 8\]; give one number of heads, or heads of one",
        ),
        ({"block_out_channels": [64, 96]}, r"x has block_out_channels \[64, 96\]; give multiples of the first width"),
        ({"sample_size": [8, 4]}, r"x has sample_size \[8, 4\]; give a network for square latents"),
    ):
        with pytest.raises(UserError, match=match):
            unet_params(kind, complete | change, "x")
