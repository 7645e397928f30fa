"""Sets of real digits on disk, and a tiny CLIP, for the tests of evaluate.py."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddim.datasets.digits import load_digit_images
from qdiff.io.images import save_png

PROMPTS = ["the digit four", "a handwritten seven", "the digit four", "a scan of the number nine", "zero"]


@functools.cache
def _digits(side: int) -> tuple[np.ndarray, np.ndarray]:
    return load_digit_images(side)


def digits(first: int, last: int, side: int = 32) -> np.ndarray:
    """uint8 [N, side, side, 3]"""
    return np.repeat(_digits(side)[0][first:last, :, :, None], 3, axis=3)


def classes(first: int, last: int) -> list[int]:
    return [int(label) for label in _digits(32)[1][first:last]]


def write_folder(path: Path, images: np.ndarray) -> Path:
    for i, image in enumerate(images):
        save_png(image, path / f"{i:05d}.png")
    return path


def write_run(path: Path, images: np.ndarray, labels: list[int] | None = None, **config: Any) -> Path:
    write_folder(path / "img", images)
    manifest = {"config": {"seed": 3, "script": "s", "method": "linear", **config}, "status": "finished"}
    (path / "run.json").write_text(json.dumps(manifest | ({} if labels is None else {"labels": labels})))
    return path


def write_npz(path: Path, images: np.ndarray, **arrays: np.ndarray) -> Path:
    np.savez(path, images, **arrays)
    return path


def write_clip(folder: Path) -> Path:
    """A CLIP of two layers with random weights, large enough that embeddings differ."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from ldm.data.captions import all_captions, write_tokenizer

    length, side = 8, 16
    write_tokenizer(folder, all_captions(), vocab_size=160, max_length=length)
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 160, "max_position_embeddings": length, "bos_token_id": 0, "eos_token_id": 1}
    text |= {"pad_token_id": 1, **tower}
    torch.manual_seed(0)
    vision = {"image_size": side, "patch_size": 4, **tower}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    sides = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessor(**sides).save_pretrained(folder)
    return folder
