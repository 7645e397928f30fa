"""The pipeline of class-conditional models for diffusers: its outputs, its noise, and its guidance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.diffusers_first_stage import first_stage_config
from ldm.diffusers_unet import unet_config

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def pipeline(unet_arguments, first_stages, fill):
    from ldm.diffusers_networks import ClassConditionalLDMPipeline, ClassEmbedder

    unet = diffusers.UNet2DConditionModel(**unet_config(unet_arguments("imagenet"), 4, "x")[1])
    vqvae = diffusers.VQModel(**first_stage_config(first_stages["vq"], "x")[1], scaling_factor=0.5)
    embedder = fill(ClassEmbedder(4, 12)).eval()
    with torch.no_grad():
        embedder.embedding.weight.mul_(20)  # or the codebook rounds the classes' difference away
    networks = (fill(vqvae).eval(), fill(unet).eval(), embedder)
    made = ClassConditionalLDMPipeline(*networks, diffusers.DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made


def test_kinds_of_images(pipeline):
    def draw(**options):
        return pipeline([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), **options)

    tensor, array, pictures = (draw(output_type=kind).images for kind in ("pt", "np", "pil"))
    assert tensor.shape == (2, 3, 16, 16) and 0 <= float(tensor.min()) < float(tensor.max()) <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.abs(np.asarray(pictures[0]) / 255 - array[0]).max() < 0.01
    assert torch.equal(draw(output_type="pt", return_dict=False)[0], tensor)


def test_the_condition_and_its_guidance(pipeline):
    def draw(labels, scale):
        latents = torch.ones(len(labels), 3, 4, 4)
        options = {"latents": latents, "num_inference_steps": 2, "output_type": "pt"}
        return pipeline(labels, guidance_scale=scale, **options).images

    plain = draw([1, 2], 1.0)
    assert float((plain[0] - plain[1]).abs().max()) > 0.05
    # With the scale 0 only "no class" is left, which is the last one.
    nothing = draw([1, 2], 0.0)
    assert torch.allclose(nothing[0], nothing[1], atol=1e-6)
    assert torch.allclose(nothing[0], draw([3], 1.0)[0], atol=1e-5)


def test_schedulers_without_eta(pipeline):
    pipeline.scheduler = diffusers.EulerDiscreteScheduler()
    assert torch.isfinite(pipeline([0], num_inference_steps=2, output_type="pt").images).all()
