"""A latent diffusion model as the folder of a pipeline of diffusers; `ldm.from_diffusers` is the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.diffusers_first_stage import first_stage_config
from ldm.diffusers_layout import first_stage_layout, unet_layout
from ldm.diffusers_unet import diffusers_class, unet_config
from ldm.locate import ImageSize, latent_shape
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.pipeline import LatentPipeline
from ldm.schedule import training_noise
from qdiff.io.diffusers_files import MakeComponent, component_of, import_diffusers
from qdiff.io.files import check_new_folder, folder_written_whole
from qdiff.sampling.diffusers_scheduler import scheduler_config


def write_pipeline(pipeline: LatentPipeline, folder: str | Path, make_unet: MakeComponent = component_of) -> str:
    """Write a model, which is loaded now; return a line that describes the folder.

    The pipeline is diffusers' ``LDMPipeline``, its ``StableDiffusionPipeline`` for texts, or the
    ``ClassConditionalLDMPipeline`` of `ldm.diffusers_networks`.

    Args:
        make_unet: makes diffusers' UNet from ours, e.g. a quantized one.

    Raises:
        UserError: diffusers is missing or has no such networks, the folder is not empty or cannot be written, or the
            weights cannot be loaded.
    """
    library = import_diffusers()
    check_new_folder(folder)
    params, origin = pipeline.model_config.model.params, f"the config {pipeline.name}"
    size = latent_shape(pipeline.model_config, ImageSize())[1]
    unet_kind, unet = unet_config(params.unet_config.params, size, origin)
    stage_kind, stage = first_stage_config(params.first_stage_config, origin)
    scheduler = library.DDIMScheduler(**scheduler_config(training_noise(params), pipeline.sampler.options))
    pipeline.load(torch.device("cpu"))
    network, first_stage = pipeline.network, pipeline.model.first_stage_model
    parameters = sum(p.numel() for p in pipeline.model.parameters())
    stage["scaling_factor"] = float(pipeline.model.scale_factor)
    parts = {
        "unet": make_unet(diffusers_class(unet_kind), unet, unet_layout(network), network, origin),
        "vae": component_of(diffusers_class(stage_kind), stage, first_stage_layout(first_stage), first_stage, origin),
        "scheduler": scheduler,
    }
    made = _pipeline(pipeline.model.cond_stage_model, **parts)
    with folder_written_whole(folder) as path:
        made.save_pretrained(path)
    return f"{folder}: {type(made).__name__}, {parameters:,} parameters"


def _pipeline(encoder: nn.Module | None, unet: nn.Module, vae: nn.Module, scheduler: Any) -> Any:
    """Return the pipeline for a kind of condition encoder."""
    from diffusers import LDMPipeline, StableDiffusionPipeline

    from ldm import diffusers_networks

    if encoder is None:
        return LDMPipeline(vae, unet, scheduler)
    if isinstance(encoder, ClassEmbedder):
        embedder = diffusers_networks.ClassEmbedder(*encoder.embedding.weight.shape)
        embedder.load_state_dict(encoder.state_dict())
        return diffusers_networks.ClassConditionalLDMPipeline(vae, unet, embedder, scheduler)
    tokenizer = encoder.tokenizer
    tokenizer.model_max_length = encoder.max_length  # the pipeline pads texts to it
    return StableDiffusionPipeline(
        vae, encoder.to_transformers(), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
