"""A latent diffusion model: UNet, first stage and condition encoder in one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.schedule import build_schedule, parameterization
from ldm.util import instantiate_from_config


class LatentDiffusion(nn.Module):
    """Holds the parts of a released checkpoint under their released names.

    Args:
        unet_config, first_stage_config, cond_stage_config: see `instantiate_from_config`.
        scale_factor: latents are multiplied by it before diffusion.
        scale_by_std: the factor was set from the first training batch and is in the checkpoint.
        use_ema: the checkpoint also holds averaged weights, which sampling uses.
        others: keys for `build_schedule` and `parameterization`; other keys that `ldm.config` allows have no effect.
    """

    def __init__(
        self,
        unet_config: Any,
        first_stage_config: Any,
        cond_stage_config: Any = "__is_unconditional__",
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        use_ema: bool = True,
        **others: Any,
    ) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = instantiate_from_config(unet_config)
        self.first_stage_model = instantiate_from_config(first_stage_config)
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        self.schedule, self.parameterization = build_schedule(others), parameterization(others)
        self.scale_by_std, self.use_ema = scale_by_std, use_ema
        self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))

    @property
    def network(self) -> nn.Module:
        """The UNet."""
        return self.model.diffusion_model

    @torch.no_grad()
    def condition(self, values: Sequence[Any]) -> Tensor | None:
        """Labels or texts, one per image → context [N, L, D]; None for an unconditional model."""
        return None if self.cond_stage_model is None else self.cond_stage_model(values)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [−1, 1] → scaled latents, sampled if the first stage is a KL one."""
        latent = self.first_stage_model.encode(images)
        latent = latent if isinstance(latent, Tensor) else latent.sample()
        return latent * self.scale_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [N, C, h, w] → images [N, 3, H, W], nominally in [−1, 1]."""
        return self.first_stage_model.decode(latents / self.scale_factor)
