"""What the tests of the latent family share: tiny UNets and first stages, and the config of a tiny model."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from ldm.modules.diffusionmodules.openaimodel import UNetModel

UNET = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 64,  # two channels a norm group: with one, the norm takes out what the time embedding adds
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 1],
}
SPATIAL = {"use_spatial_transformer": True, "context_dim": 12}
# One of every released architecture, in small.
KINDS = {
    "bedroom": {"num_head_channels": 16},
    "church": {"num_heads": 4, "use_scale_shift_norm": True, "resblock_updown": True},
    "imagenet": {"num_heads": 1, **SPATIAL},
    "sd": {"num_heads": 4, "use_checkpoint": True, "legacy": False, **SPATIAL},
}
DDCONFIG = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {"embed_dim": 3, "n_embed": 16, "ddconfig": DDCONFIG},
}
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": DDCONFIG | {"double_z": True, "z_channels": 4}},
}


@torch.no_grad()
def filled(module, seed=0):
    """Fixed random parameters everywhere: what starts as zero would hide what leads to it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if parameter.dim() == 1:
            parameter += 0.5
    return module


@pytest.fixture(autouse=True)
def seeded():
    """The same inputs in every run, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def unet_arguments():
    """``unet_arguments(kind, **changes)``: the arguments of a tiny UNet of that released architecture."""

    def made(kind: str, **changes) -> dict:
        return {**UNET, **KINDS[kind], **changes}

    return made


@pytest.fixture
def make_unet(unet_arguments):
    """``make_unet(kind, **changes)``: a tiny UNet of that released architecture, no parameter zero, in eval mode."""

    def made(kind: str, **changes) -> UNetModel:
        torch.manual_seed(0)
        return filled(UNetModel(**unet_arguments(kind, **changes))).eval()

    return made


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def fill():
    """``fill(module, seed)``: fixed random parameters, none of them zero."""
    return filled


@pytest.fixture
def unet_inputs():
    """``unet_inputs(network, count)``: (x, t) or (x, t, context)."""

    def made(network: UNetModel, count: int = 2, seed: int = 1) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, network.in_channels, 8, 8, generator=generator)
        t = torch.randint(1000, (count,), generator=generator)
        if network.context_dim is None:
            return x, t
        return x, t, torch.randn(count, 5, network.context_dim, generator=generator)

    return made


@pytest.fixture
def model_config():
    """``model_config(kind, first_stage, **params)``: the config of a tiny model."""

    def made(kind: str = "bedroom", first_stage: dict = VQ, **params):
        unet = {**UNET, **KINDS[kind]}
        latent = first_stage["params"]["embed_dim"]
        unet |= {"image_size": 4, "in_channels": latent, "out_channels": latent}
        fixed = {
            "linear_start": 0.0015,
            "linear_end": 0.0195,
            "conditioning_key": "crossattn",
            "image_size": 4,
            "channels": latent,
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
            "first_stage_config": first_stage,
            "cond_stage_config": "__is_unconditional__",
        }
        return OmegaConf.create(
            {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**fixed, **params}}}
        )

    return made


@pytest.fixture(scope="session")
def first_stages():
    """Configs of tiny first stages by their kind."""
    return {"vq": VQ, "kl": KL}


@pytest.fixture(scope="session")
def relative():
    """``relative(out, expected)``: ‖out − expected‖ / ‖expected‖."""

    def error(out: torch.Tensor, expected: torch.Tensor) -> float:
        return float((out.double() - expected.double()).norm() / expected.double().norm())

    return error
