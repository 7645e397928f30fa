"""The networks of the golden cases as networks of diffusers: class, arguments, layout, and an exact time embedding."""

from __future__ import annotations

import functools
from typing import Any

from exact_time import ExactTime
from golden_cases import GoldenCase
from omegaconf import OmegaConf
from torch import nn

import ddim.diffusers_layout
import ddim.models.layers
import ldm.diffusers_layout
import ldm.modules.diffusionmodules.util
from ldm.diffusers_unet import NARROW, diffusers_class, unet_config
from qdiff.io.tensor_layout import NetworkLayout


def is_ddim(golden: GoldenCase) -> bool:
    return golden.case["family"] == "ddim"


@functools.cache
def layout_of(name: str) -> NetworkLayout:
    """Return the layout of a case's network."""
    golden = GoldenCase(name)
    family = ddim if is_ddim(golden) else ldm
    return family.diffusers_layout.unet_layout(golden.network())


def class_and_arguments(golden: GoldenCase) -> tuple[type, dict[str, Any]]:
    """Return the class of a case's network in diffusers, and its arguments."""
    if not is_ddim(golden):
        kind, arguments = unet_config(golden.case["model"], golden.case["model"]["image_size"], golden.name)
        return diffusers_class(kind), arguments
    config = OmegaConf.create(golden.case["config"])
    width, factors = config.model.ch, list(config.model.ch_mult)
    if factors[0] == 1:
        return diffusers_class(ddim.diffusers_layout.UNET), ddim.diffusers_layout.unet_config(config, golden.name)
    # No DDPM has a narrow stem, so only the class for latent diffusion's narrow stems can be this network.
    config.model.ch_mult = [1] * len(factors)
    arguments = ddim.diffusers_layout.unet_config(config, golden.name)
    arguments["block_out_channels"] = [width * factor for factor in factors]
    return diffusers_class(NARROW), arguments | {"stem_channels": width, "time_embedding_dim": 4 * width}


def in_double(golden: GoldenCase, network: nn.Module) -> nn.Module:
    """Convert a case's network of diffusers to float64, its time embedding included."""
    model = golden.case["config"]["model"] if is_ddim(golden) else golden.case["model"]
    embedding = ddim.models.layers if is_ddim(golden) else ldm.modules.diffusionmodules.util
    network.double().time_proj = ExactTime(
        embedding.timestep_embedding, model["ch"] if is_ddim(golden) else model["model_channels"]
    )
    return network
