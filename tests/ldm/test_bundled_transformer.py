"""The bundled transformer: plain diffusers loads it, and it draws the classes that it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qdiff.evaluation.extractors import create_extractor, extractor_spec
from qdiff.evaluation.features import forward

diffusers = pytest.importorskip("diffusers")

FOLDER = Path(__file__).parents[2] / "models" / "dit_digits"


def test_its_size():
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(FOLDER, subfolder="transformer")
    assert sum(p.numel() for p in transformer.parameters()) < 1_500_000
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 6e6


@pytest.mark.slow
def test_it_draws_what_is_asked_for():
    pipe = diffusers.DiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    asked = [*range(10), *range(10)]
    options = {"guidance_scale": 2.0, "num_inference_steps": 10, "output_type": "pt"}
    images = pipe(asked, generator=torch.Generator().manual_seed(0), **options).images
    extractor = create_extractor("digits-classifier", None, torch.device("cpu"))
    outputs, _ = forward(extractor, (images * 255).round().to(torch.uint8))
    seen = outputs[extractor_spec("digits-classifier").logits_layer].argmax(1)
    assert (seen == torch.tensor(asked)).float().mean() > 0.8
