"""Training with Lightning: the simple DDPM loss, an EMA of the weights, and runs that can be resumed."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from ddim.config import build_schedule, parameterization
from ddim.datasets.transform import to_network_range
from ddim.models.diffusion import Model
from qdiff.errors import UserError
from qdiff.io.files import check_writable
from qdiff.io.progress import Progress, progress_bar
from qdiff.sampling import DiffusionSchedule, Parameterization, training_target

SETTINGS = "qdiff_settings"  # key in a checkpoint


class OptimisedTask(pl.LightningModule):
    """Adam with warm-up and cosine decay, for any training step.

    Args:
        optim: ``lr``, ``beta1``, ``eps``, ``weight_decay`` and, optionally, ``warmup_steps``.
        total_steps: total number of optimiser steps.
    """

    def __init__(self, optim: Any, total_steps: int) -> None:
        super().__init__()
        self.optim, self.total_steps = optim, total_steps
        self.settings: dict[str, Any] = {}  # saved with every checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[SETTINGS] = self.settings

    def configure_optimizers(self) -> dict[str, Any]:
        optim = self.optim
        optimizer = torch.optim.Adam(
            [p for p in self.parameters() if p.requires_grad],
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


class DenoisingTask(OptimisedTask):
    """Minimise E‖ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t)‖² (Ho et al., 2020, eq. 14), or likewise for x_0 or v.

    Args:
        model: takes (x_t [N, C, H, W], t [N], *condition).
        schedule: ᾱ_t.
        optim, total_steps: see `OptimisedTask`.
        ema_rate: decay of the averaged weights, ``ema``.
        predicts: the quantity that the network is trained to predict.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: DiffusionSchedule,
        optim: Any,
        ema_rate: float,
        total_steps: int,
        predicts: Parameterization = Parameterization.EPS,
    ) -> None:
        super().__init__(optim, total_steps)
        self.model, self.predicts = model, predicts
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_rate)).requires_grad_(False)
        self.register_buffer("alphas_cumprod", schedule.alphas_cumprod.float(), persistent=False)

    def denoising_loss(self, x_0: Tensor, *condition: Any) -> Tensor:
        """Return the mean squared error of the prediction at random times, for clean samples x_0 [N, C, H, W]."""
        t = torch.randint(len(self.alphas_cumprod), (len(x_0),), device=x_0.device)
        noise = torch.randn_like(x_0)
        abar = self.alphas_cumprod[t][:, None, None, None]
        predicted = self.model(abar.sqrt() * x_0 + (1 - abar).sqrt() * noise, t, *condition)
        loss = F.mse_loss(predicted, training_target(self.predicts, x_0, noise, abar))
        self.log("loss", loss, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update_parameters(self.model)


class NoisePredictionTask(DenoisingTask):
    """Training of a DDIM model on images.

    Args:
        config: a DDIM model's config with ``optim`` and ``model.ema_rate``.
    """

    def __init__(self, config: Any, total_steps: int) -> None:
        schedule, predicts = build_schedule(config), parameterization(config)
        super().__init__(Model(config), schedule, config.optim, config.model.ema_rate, total_steps, predicts)
        self.data = config.data

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        (images,) = batch
        return self.denoising_loss(to_network_range(images, self.data))


class EpochProgress(pl.Callback):
    """Shows the share of epochs that is done, and the values that the task logs for the bar.

    It replaces Lightning's own bar, which restarts at every epoch and fills log files.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._bar = progress_bar(trainer.max_epochs, "training", "epoch", initial=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        values = trainer.progress_bar_metrics.items()
        self._bar.set_postfix_str(", ".join(f"{name} {float(value):.4g}" for name, value in values), refresh=False)
        self._bar.update()

    def on_train_end(self, *_: Any) -> None:
        self._bar.close()

    def on_exception(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def fit(
    task: OptimisedTask,
    loader: DataLoader,
    epochs: int,
    workdir: str | Path,
    grad_clip: float,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Train, continuing from the last checkpoint in ``workdir``.

    Args:
        settings: JSON values that define the training; a checkpoint made with other settings is not continued.

    Returns:
        ``epochs``, ``steps``, ``images``, ``final_loss`` (None if not finite), ``minutes`` of this call, ``torch``.

    Raises:
        UserError: the checkpoint in ``workdir`` was made with other settings.
    """
    last = Path(workdir) / "last.ckpt"
    _check_settings(last, settings)
    task.settings = settings
    checkpoints = pl.callbacks.ModelCheckpoint(
        dirpath=workdir, filename="last", save_last=False, every_n_epochs=10, enable_version_counter=False
    )
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        gradient_clip_val=grad_clip,
        callbacks=[checkpoints, EpochProgress()],
        enable_progress_bar=False,
        logger=False,
        log_every_n_steps=1,
    )
    started = time.time()
    trainer.fit(task, loader, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    loss = float(trainer.callback_metrics.get("loss", math.nan))
    return {
        "epochs": epochs,
        "steps": epochs * len(loader),
        "images": len(loader.dataset),
        "final_loss": round(loss, 5) if math.isfinite(loss) else None,
        "minutes": round((time.time() - started) / 60, 1),
        "torch": torch.__version__,
    }


def _check_settings(last: Path, settings: dict[str, Any]) -> None:
    check_writable(last)
    if not last.is_file():
        return
    before = torch.load(last, map_location="cpu", weights_only=True, mmap=True).get(SETTINGS, {})
    for name in sorted(settings.keys() | before.keys()):
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{last} was trained with another {name}; choose another --workdir, or delete it to start again"
            )
