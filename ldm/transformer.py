"""A class-conditional DiT of diffusers, trained on the latents of a pipeline's autoencoder."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ddim.datasets import load_training_images, load_training_labels
from ddim.training import DenoisingTask, fit
from ldm.keys import COUNT, PRETRAINED
from qdiff.errors import UserError, first_line, require_at_least
from qdiff.io.config_schema import Key, check_section
from qdiff.io.diffusers_files import component_names
from qdiff.io.files import check_new_folder, folder_written_whole
from qdiff.io.yaml_files import read_config
from qdiff.sampling.diffusers_scheduler import training_noise_of

NO_CLASS = 1000  # what DiTPipeline calls the transformer with for the unconditional half
TOP = {
    "transformer": Key(Mapping, required=True),
    "data": Key(Mapping, required=True),
    "training": Key(Mapping, required=True),
    "pretrained": Key(Mapping),
}
TRAINING = {
    "n_epochs": Key(int, required=True, least=1),
    "batch_size": Key(int, required=True, least=1),
    "ema_rate": Key(float, required=True, least=0),
    "condition_dropout": Key(float, least=0),
    "optim": Key(Mapping, required=True),
}
OPTIM = {
    **{name: Key(float, required=True, least=0) for name in ("lr", "beta1", "eps", "weight_decay", "grad_clip")},
    "warmup_steps": COUNT,
}
DATA = {"dataset": Key(str, required=True), "image_size": Key(int, required=True, least=1), "channels": COUNT}


class ClassConditionalTransformer(nn.Module):
    """The DiT as a network of (x_t [N, C, H, W], t [N], labels [N]).

    Every block of diffusers' class has a class embedding of its own and drops labels by itself while training; a label
    is dropped for all blocks at once here, by `TransformerTask`. Blocks begin as the identity (Peebles & Xie 2023,
    section 3.2, "adaLN-Zero"), which the class leaves to its user.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.transformer = DiTTransformer2DModel(**config)
        for block in self.transformer.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
        for layer in (self.transformer.proj_out_1, self.transformer.proj_out_2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.transformer(x, timestep=t, class_labels=labels).sample


class TransformerTask(DenoisingTask):
    """Training on the latents of images; labels are dropped at random, for guidance (Ho & Salimans 2022).

    Args:
        network: see `ClassConditionalTransformer`.
        scale: the autoencoder's ``scaling_factor``, which multiplies latents.
        config: the section ``training`` of the config.
        total_steps: see `DenoisingTask`.
        scheduler: describes the training noise.
    """

    def __init__(self, network: nn.Module, scale: float, config: Any, total_steps: int, scheduler: Any) -> None:
        noise = training_noise_of(scheduler.config, "the scheduler")
        optim, rate = config.optim, config.ema_rate
        super().__init__(network, noise.schedule(), optim, rate, total_steps, noise.parameterization)
        self.scale, self.drop = scale, config.get("condition_dropout", 0.0)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        mean, std, labels = batch
        dropped = torch.rand(len(labels), device=labels.device) < self.drop
        labels = torch.where(dropped, NO_CLASS, labels)
        return self.denoising_loss((mean + std * torch.randn_like(mean)) * self.scale, labels)


def load_transformer_config(path: str | Path) -> Any:
    """Return the config of a training, all keys checked.

    Raises:
        UserError: the file is missing, is not YAML, or has a wrong key or value.
    """
    config, origin = read_config(Path(path), "see configs/digits-dit.yaml"), f"config file {path}"
    check_section(config, TOP, "", origin)
    for name, keys in (("data", DATA), ("training", TRAINING)):
        check_section(config[name], keys, name, origin)
    check_section(config.training.optim, OPTIM, "training.optim", origin)
    check_section(config.get("pretrained") or {}, PRETRAINED, "pretrained", origin)
    classes = config.transformer.get("num_embeds_ada_norm")
    if classes != NO_CLASS:
        raise UserError(f"{origin} has transformer.num_embeds_ada_norm {classes}; DiTPipeline needs {NO_CLASS}")
    return config


def train_transformer(args: Namespace) -> str:
    """Train a DiT and write it with its autoencoder and scheduler as a ``DiTPipeline``, float16.

    Args:
        args: the options of scripts/train_dit.py.

    Returns:
        A line that describes the folder.

    Raises:
        UserError: the config or the first stage does not suit the training, or the folder exists.
    """
    from omegaconf import OmegaConf

    check_new_folder(args.out)
    config = load_transformer_config(args.config)
    training, origin = config.training, f"config file {args.config}"
    epochs = training.n_epochs if args.epochs is None else args.epochs
    require_at_least(1, {"--epochs": epochs})
    vae, scheduler = _first_stage(args.first_stage)
    network = _network(OmegaConf.to_container(config.transformer, resolve=True), vae, config.data.image_size, origin)
    images, labels = load_training_images(config.data), load_training_labels(config.data)
    latents = latent_moments(vae, images)
    loader = DataLoader(TensorDataset(*latents, labels), training.batch_size, shuffle=True, drop_last=True)
    task = TransformerTask(network, vae.config.scaling_factor, training, epochs * len(loader), scheduler)
    settings = {"config": OmegaConf.to_container(config, resolve=True), "seed": args.seed}
    notes = fit(task, loader, epochs, args.workdir or f"{args.out}.work", training.optim.grad_clip, settings)
    averaged = task.ema.module.transformer.cpu().eval()
    parameters = sum(p.numel() for p in averaged.parameters())
    made = DiTPipeline(averaged.half(), vae.half(), scheduler)
    with folder_written_whole(args.out) as path:
        made.save_pretrained(path)
    return f"{args.out}: {parameters} parameters of the transformer, {notes}"


def _first_stage(folder: str) -> tuple[nn.Module, Any]:
    """Return the autoencoder and the scheduler of a pipeline's folder."""
    parts = component_names(folder)
    name = next((name for name, kind in parts.items() if kind == "AutoencoderKL"), None)
    if name is None or "scheduler" not in parts:
        raise UserError(f"{folder} has no AutoencoderKL with a scheduler, which DiTPipeline needs; give another folder")
    try:
        vae = AutoencoderKL.from_pretrained(folder, subfolder=name, local_files_only=True)
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}; convert it again") from error
    return vae.requires_grad_(False).eval(), scheduler


def _network(config: dict[str, Any], vae: nn.Module, image_size: int, origin: str) -> ClassConditionalTransformer:
    """Return the untrained network; a `UserError` if its arguments are wrong or do not suit the autoencoder."""
    latent = image_size // 2 ** (len(vae.config.block_out_channels) - 1)
    expected = {"in_channels": vae.config.latent_channels, "out_channels": vae.config.latent_channels}
    for name, value in (expected | {"sample_size": latent}).items():
        if config.get(name) != value:
            raise UserError(f"{origin} has transformer.{name} {config.get(name)}; the autoencoder needs {value}")
    try:
        return ClassConditionalTransformer(**config)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{origin} describes no DiT: {first_line(error)}; correct the section transformer") from error


@torch.no_grad()
def latent_moments(vae: nn.Module, images: Tensor, batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every image's unscaled latent, each [N, C, h, w]."""
    found = [vae.encode(batch).latent_dist for batch in images.split(batch_size)]
    return torch.cat([d.mean for d in found]), torch.cat([d.std for d in found])
