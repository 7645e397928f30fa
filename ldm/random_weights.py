"""A model with a config's shapes and random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoint import build_without_weights
from ldm.config import load_config
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from qdiff.io.files import check_writable
from qdiff.io.model_files import write_model
from qdiff.io.random_weights import random_values
from qdiff.io.repository import REPOSITORY

TOKENIZER = REPOSITORY / "models" / "ldm" / "digits_text" / "text_encoder"


def write_random_model(config_path: str | Path, folder: str | Path, seed: int) -> str:
    """Write ``model.safetensors`` (float16) and ``config.yaml``; return a line that describes them.

    Matrices and kernels have variance 1/fan-in, norms are the identity, so activations stay of order 1.

    Raises:
        UserError: the config is invalid, or the folder cannot be written.
    """
    config, folder = load_config(config_path), Path(folder)
    check_writable(folder / "model.safetensors")
    model = build_without_weights(config)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model.cond_stage_model, FrozenCLIPEmbedder):
        encoder = folder / "text_encoder"
        encoder.mkdir(exist_ok=True)
        for file in TOKENIZER.glob("*"):
            shutil.copyfile(file, encoder / file.name)
        model.cond_stage_model.transformer.text_model.config.save_pretrained(encoder)
        config.model.params.cond_stage_config.params = {"version": str(encoder.resolve())}
    generator = torch.Generator().manual_seed(seed)
    state = {n: _random(v, n, generator) for n, v in model.state_dict().items() if v.is_floating_point()}
    write_model(folder / "model.safetensors", state, config)
    parameters = sum(v.numel() for v in state.values())
    return f"{folder}: {parameters:,} random parameters, {(folder / 'model.safetensors').stat().st_size:,} bytes"


def _random(like: Tensor, name: str, generator: torch.Generator) -> Tensor:
    if name == "scale_factor":
        return torch.ones(())
    return random_values(like, name, generator).half()
