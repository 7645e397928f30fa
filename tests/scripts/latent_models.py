"""Tiny latent diffusion models on disk, one a family: untrained, 8×8 latents, images of 16×16."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from script_device import ON_DEVICE
from torch import Tensor, nn

from ldm.config import load_config
from ldm.data.captions import WORDS, all_captions, write_tokenizer
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.util import instantiate_from_config

SIDE, LATENT, TRAIN_STEPS, WIDTH = 16, 8, 40, 32
CLASSES, TOKENS = 3, 12
SMALL_UNET = {"channel_mult": [1], "attention_resolutions": []}  # of the UNet: one transformer block
CHANNELS = {"unconditional": 3, "class": 3, "text": 4}

# Options of the latent scripts' tests.
W4A8 = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8)
FEW = ("--cali_st", 2, "--cali_n", 3, "--cali_iters", 3, "--cali_iters_a", 2, "--cali_batch_size", 4)
GREY_LEVELS = 1  # what another batch size may move a pixel: float sums then round differently


@dataclass(frozen=True)
class LatentModelFiles:
    """Where a tiny model lies: ``config.yaml`` and ``model.safetensors`` in one folder."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def weights(self) -> Path:
        return self.folder / "model.safetensors"

    @property
    def options(self) -> tuple[object, ...]:
        """Of the guided scripts."""
        return "--config", self.config, "--ckpt", self.weights, *ON_DEVICE


def write_latent_model(
    kind: str, folder: Path, unet: dict | None = None, unet_weights: dict[str, Tensor] | None = None
) -> LatentModelFiles:
    """Write a model of a kind (a key of `CHANNELS`) with fixed random weights.

    Args:
        unet: arguments of the UNet instead of the tiny one's.
        unet_weights: its weights.
    """
    files = LatentModelFiles(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unet = unet or unet_of(kind)
    if kind == "text":
        _write_text_encoder(folder / "text_encoder", unet["context_dim"])
    files.config.write_text(json.dumps(_config(kind, folder, unet)))  # JSON is YAML
    torch.manual_seed(0)
    model: LatentDiffusion = instantiate_from_config(load_config(files.config).model)
    for parameter in model.parameters():  # layers that start at zero would hide what comes before them
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    if unet_weights is not None:
        model.network.load_state_dict(unet_weights)
    save_file({name: _unshared(value) for name, value in model.state_dict().items()}, files.weights)
    return files


def _unshared(value: Tensor) -> Tensor:
    return value.detach().clone().contiguous()


def unet_of(kind: str, **changes: object) -> dict:
    """Return the arguments of the tiny UNet of a kind, some of them changed."""
    made = {
        "image_size": LATENT,
        "in_channels": CHANNELS[kind],
        "out_channels": CHANNELS[kind],
        "model_channels": WIDTH,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 1],
        "num_heads": 2,
    }
    if kind != "unconditional":
        made |= {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": WIDTH, "use_checkpoint": True}
        made["legacy"] = kind == "class"
    return made | changes


def _config(kind: str, folder: Path, unet: dict) -> dict:
    channels = unet["in_channels"]
    stage = {
        "embed_dim": channels,
        "ddconfig": {
            "double_z": kind == "text",
            "z_channels": channels,
            "resolution": SIDE,
            "in_channels": 3,
            "out_ch": 3,
            "ch": WIDTH,
            "ch_mult": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    }
    first_stage = "AutoencoderKL" if kind == "text" else "VQModelInterface"
    encoder: object = "__is_unconditional__"
    if kind == "class":
        encoder = {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"embed_dim": unet["context_dim"], "n_classes": CLASSES + 1, "key": "class_label"},
        }
    if kind == "text":
        encoder = {
            "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
            "params": {"version": str(folder / "text_encoder")},
        }
    else:
        stage["n_embed"] = 16
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "linear_start": 0.0015,
                "linear_end": 0.0195,
                "timesteps": TRAIN_STEPS,
                "image_size": LATENT,
                "channels": channels,
                "use_ema": False,
                "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
                "first_stage_config": {"target": f"ldm.models.autoencoder.{first_stage}", "params": stage},
                "cond_stage_config": encoder,
                "conditioning_key": "crossattn",
            },
        },
        "pretrained": {"class_words": list(WORDS)} if kind == "text" else {},
    }


def _write_text_encoder(folder: Path, width: int) -> None:
    write_tokenizer(folder, all_captions(), vocab_size=128, max_length=TOKENS)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    config = {
        "model_type": "clip_text_model",
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": TOKENS,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    (folder / "config.json").write_text(json.dumps(config))
