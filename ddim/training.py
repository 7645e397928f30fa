"""Training of the noise predictor with Lightning: the simple DDPM loss and an EMA of the weights."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddim.config import build_schedule
from ddim.models.diffusion import Model


class NoisePredictionTask(pl.LightningModule):
    """Minimise E‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖² (Ho et al., 2020, eq. 14).

    Args:
        config: a DDIM model's config with ``optim`` and ``model.ema_rate``.
        total_steps: optimiser steps of the whole training, for the cosine decay of the learning rate.
    """

    def __init__(self, config: Any, total_steps: int) -> None:
        super().__init__()
        self.config = config
        self.total_steps = total_steps
        self.model = Model(config)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.model.ema_rate))
        abar = build_schedule(config).alphas_cumprod.float()
        self.register_buffer("alphas_cumprod", abar, persistent=False)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        (x_0,) = batch
        t = torch.randint(len(self.alphas_cumprod), (len(x_0),), device=x_0.device)
        noise = torch.randn_like(x_0)
        abar = self.alphas_cumprod[t][:, None, None, None]
        predicted = self.model(abar.sqrt() * x_0 + (1 - abar).sqrt() * noise, t)
        loss = F.mse_loss(predicted, noise)
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update_parameters(self.model)

    def configure_optimizers(self) -> dict[str, Any]:
        optim = self.config.optim
        optimizer = torch.optim.Adam(
            self.model.parameters(),
            lr=optim.lr,
            betas=(optim.beta1, 0.999),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        warmup = optim.get("warmup_steps", 0)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = (step - warmup) / max(1, self.total_steps - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
