"""Check that the parts of a latent diffusion config fit each other, without weights."""

from __future__ import annotations

from typing import Any

import torch

from ldm.util import instantiate_from_config
from qdiff.errors import UserError
from qdiff.machine.meta_device import check_runs


def check_sizes(config: Any, origin: str, latent: tuple[int, int, int] | None = None) -> None:
    """Raise a `UserError` if UNet, first stage and condition encoder of a config cannot work together.

    Args:
        origin: the config's name in error messages.
        latent: (C, h, w) of the sampled latents; None takes the config's.
    """
    params = config.model.params
    unet, first = params.unet_config.params, params.first_stage_config.params
    channels, size = params.get("channels", 3), params.get("image_size", 256)
    fits = (
        ("unet_config.params.in_channels", unet.get("in_channels"), "latents have model.params.channels"),
        ("unet_config.params.out_channels", unet.get("out_channels"), "latents have model.params.channels"),
        ("first_stage_config.params.embed_dim", first.get("embed_dim"), "latents have model.params.channels"),
    )
    for name, value, because in fits:
        if value is not None and value != channels:
            raise UserError(f"{origin} has model.params.{name} {value}, but {because} {channels}; make them equal")
    latent = latent or (channels, size, size)
    halvings = len(unet.get("channel_mult", (1, 2, 4, 8))) - 1
    if latent[1] % 2**halvings or latent[2] % 2**halvings:
        raise UserError(
            f"{origin} describes latents of {latent[1]}×{latent[2]}, which the {halvings} halvings of the UNet's "
            f"channel_mult do not divide; give sides that are multiples of {2**halvings}"
        )
    with check_runs(origin, "model.params of the UNet and of the stages"), torch.device("meta"):
        network = instantiate_from_config(params.unet_config)
        encoder = instantiate_from_config(params.get("cond_stage_config", "__is_unconditional__"))
        context = None if encoder is None else torch.zeros(1, getattr(encoder, "max_length", 1), encoder.width)
        if context is not None and network.context_dim != encoder.width:
            raise UserError(
                f"{origin} has unet_config.params.context_dim {network.context_dim}, but the condition encoder returns "
                f"vectors of {encoder.width}; make them equal"
            )
        inputs = (torch.zeros(1, *latent), torch.zeros(1), *([] if context is None else [context]))
        network(*inputs)
        images = instantiate_from_config(params.first_stage_config).decode(inputs[0])
    if images.shape[1] != 3:
        raise UserError(f"{origin} decodes to {images.shape[1]} channels; images have 3; correct out_ch of ddconfig")
