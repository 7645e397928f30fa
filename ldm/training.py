"""Training of latent diffusion models: first stage, then the denoiser on the first stage's latents."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ddim.training import DenoisingTask, OptimisedTask
from ldm.models.autoencoder import FirstStage, VQModelInterface
from ldm.models.diffusion.ddpm import LatentDiffusion


class FirstStageTask(OptimisedTask):
    """Minimise |x − decoded| + weight · (codebook loss, or KL divergence per latent value).

    During the first half of training, codebook entries that were unused for a whole epoch are moved to encoder outputs.

    Args:
        config: ``optim`` and ``regulariser_weight``.
    """

    def __init__(self, model: nn.Module, config: Any, total_steps: int) -> None:
        super().__init__(config.optim, total_steps)
        self.model, self.weight = model, config.regulariser_weight
        self.used: set[int] = set()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        (x,) = batch
        reconstruction, regulariser = self.model.reconstruct_with_loss(x)
        loss = F.l1_loss(reconstruction, x) + self.weight * regulariser
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True)
        if isinstance(self.model, VQModelInterface):
            with torch.no_grad():
                self.latent = self.model.encode(x)
                self.used.update(self.model.quantize.indices(self.latent).unique().tolist())
        return loss

    @torch.no_grad()
    def on_train_epoch_end(self) -> None:
        if not isinstance(self.model, VQModelInterface):
            return
        codes = self.model.quantize.embedding.weight
        idle = [i for i in range(len(codes)) if i not in self.used]
        self.log("idle_codes", float(len(idle)), prog_bar=True)
        if idle and self.global_step < self.total_steps // 2:
            vectors = rearrange(self.latent, "n d h w -> (n h w) d")
            codes[idle] = vectors[torch.randint(len(vectors), (len(idle),), device=vectors.device)]
        self.used.clear()


class ConditionedDenoiser(nn.Module):
    """The UNet and the condition encoder trained with it, as one network of (x_t, t, values)."""

    def __init__(self, model: LatentDiffusion) -> None:
        super().__init__()
        self.diffusion_model, self.cond_stage_model = model.network, model.cond_stage_model

    def forward(self, x: Tensor, t: Tensor, values: Any = None) -> Tensor:
        if self.cond_stage_model is None:
            return self.diffusion_model(x, t)
        return self.diffusion_model(x, t, self.cond_stage_model(values))


class LatentDenoisingTask(DenoisingTask):
    """Training of the denoiser on cached latents; conditions are dropped at random, for guidance (Ho & Salimans 2022).

    Args:
        model: has a trained first stage and its ``scale_factor`` set.
        describe: turns labels [N] into inputs of the condition encoder; None for an unconditional model.
        drop: share of conditions that are replaced with the encoder's ``unconditional`` value.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: Any,
        total_steps: int,
        describe: Callable[[Tensor], list[Any]] | None,
        seed: int,
    ) -> None:
        super().__init__(
            ConditionedDenoiser(model),
            model.schedule,
            config.optim,
            config.ema_rate,
            total_steps,
            model.parameterization,
        )
        self.scale = float(model.scale_factor)
        self.describe, self.drop = describe, config.get("condition_dropout", 0.0)
        self.source = random.Random(seed)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        mean, std, labels = batch
        x_0 = (mean + std * torch.randn_like(mean)) * self.scale
        if self.describe is None:
            return self.denoising_loss(x_0)
        nothing = self.model.cond_stage_model.unconditional
        values = [nothing if self.source.random() < self.drop else value for value in self.describe(labels)]
        return self.denoising_loss(x_0, values)


@torch.no_grad()
def latent_moments(first_stage: FirstStage, images: Tensor, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every image's unscaled latent, each [N, C, h, w]; std is 0 for VQ."""
    means, stds = [], []
    for batch in images.split(batch_size):
        latent = first_stage.encode(batch)
        if isinstance(latent, Tensor):
            means.append(latent)
            stds.append(torch.zeros_like(latent))
        else:
            means.append(latent.mean)
            stds.append((0.5 * latent.log_variance).exp())
    return torch.cat(means), torch.cat(stds)
