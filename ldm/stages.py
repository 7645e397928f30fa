"""The two stages of scripts/train_ldm.py."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ddim.datasets import load_training_images, load_training_labels
from ddim.training import fit
from ldm.config import load_config
from ldm.data.captions import all_captions, random_caption, write_tokenizer
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.sizes import check_sizes
from ldm.training import FirstStageTask, LatentDenoisingTask, latent_moments
from ldm.util import instantiate_from_config
from qdiff.errors import UserError, require_at_least
from qdiff.io.files import written_whole
from qdiff.io.tensor_files import check_state, read_float_tensors, unwrapped

PREFIX = "first_stage_model."


def train_first_stage(args: Namespace) -> dict[str, Any]:
    """Train the autoencoder of a config and write it under ``first_stage_model.*``."""
    config, stage, epochs = _plan(args, "first_stage")
    model = instantiate_from_config(config.model.params.first_stage_config)
    images = load_training_images(config.data)
    loader = _loader(stage.batch_size, images)
    task = FirstStageTask(model, stage, epochs * len(loader))
    notes = _notes(args) | fit(task, loader, epochs, _workdir(args), stage.optim.grad_clip, _notes(args))
    _save({PREFIX + k: v for k, v in model.eval().state_dict().items()}, args.out, notes)
    latents, _ = latent_moments(model, images)
    with torch.no_grad():
        decoded = torch.cat([model.decode(m) for m in latents.split(256)])
    return notes | {"mean_absolute_error": round(float((decoded - images).abs().mean()), 5)}


def _plan(args: Namespace, stage: str) -> tuple[Any, Any, int]:
    """Return the config, its section for a stage, and the number of epochs.

    Raises:
        UserError: the config does not describe the training, or the number of epochs is below 1.
    """
    config = load_config(args.config)
    check_sizes(config, f"config file {args.config}")
    section = (config.get("training") or {}).get(stage)
    if not section or not config.get("data"):
        raise UserError(
            f"config file {args.config} has no data or training.{stage}; see models/ldm/digits_vq/config.yaml"
        )
    epochs = section.n_epochs if args.epochs is None else args.epochs
    require_at_least(1, {"--epochs": epochs})
    return config, section, epochs


def train_diffusion(args: Namespace) -> dict[str, Any]:
    """Train a config's denoiser (and its condition encoder) and write the whole model with averaged weights.

    An existing tokenizer is kept, because weights that were trained with it depend on its token numbers.
    """
    config, stage, epochs = _plan(args, "diffusion")
    if captions := config.data.get("captions"):
        folder = Path(config.model.params.cond_stage_config.params.version)
        if not (folder / "vocab.json").is_file():
            write_tokenizer(folder, all_captions(), **captions)
    model: LatentDiffusion = instantiate_from_config(config.model)
    first = unwrapped(read_float_tensors(Path(args.first_stage)), model.state_dict())
    first = {k.removeprefix(PREFIX): v for k, v in first.items()}
    check_state(first, model.first_stage_model.state_dict(), args.first_stage)
    model.first_stage_model.load_state_dict(first)
    model.first_stage_model.eval()
    mean, std = latent_moments(model.first_stage_model, load_training_images(config.data))
    if model.scale_by_std:
        model.scale_factor.fill_(1.0 / (mean + std * torch.randn_like(std)).std())
    loader = _loader(stage.batch_size, mean, std, load_training_labels(config.data))
    task = LatentDenoisingTask(model, stage, epochs * len(loader), _describer(model, args.seed), args.seed)
    notes = _notes(args) | fit(task, loader, epochs, _workdir(args), stage.optim.grad_clip, _notes(args))
    averaged = task.ema.module
    model.model.diffusion_model = averaged.diffusion_model
    model.cond_stage_model = averaged.cond_stage_model
    _save(model.state_dict(), args.out, notes)
    return notes | {"scale_factor": float(model.scale_factor)}


def _describer(model: LatentDiffusion, seed: int) -> Callable[[Tensor], list[Any]] | None:
    if model.cond_stage_model is None:
        return None
    if not isinstance(model.cond_stage_model, FrozenCLIPEmbedder):
        return lambda labels: labels.tolist()
    source = random.Random(seed + 1)
    return lambda labels: [random_caption(label, source) for label in labels.tolist()]


def _loader(batch_size: int, *tensors: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True, drop_last=True)


def _workdir(args: Namespace) -> str:
    return args.workdir or f"{args.out}.work"


def _notes(args: Namespace) -> dict[str, Any]:
    return {"config": args.config, "seed": args.seed, "stage": args.stage}


def _save(state: dict[str, Tensor], out: str, notes: dict[str, Any]) -> None:
    """Write weights as float16 and the scale factor as float32."""
    tensors = {
        k: (v if k == "scale_factor" else v.half()).contiguous().cpu()
        for k, v in state.items()
        if v.is_floating_point()
    }
    with written_whole(out) as path:
        save_file(tensors, path, metadata={"training": json.dumps(notes)})
