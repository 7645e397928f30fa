"""The sampling scripts of all model families, one row each. A new family adds its folder, its script and a row."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ddim import options as ddim
from ldm import options as ldm
from qdiff.cli.script import Script
from qdiff.diffusers_backend.options import add_pipeline_options

_ROWS = (
    Script(
        "sample_diffusion_ddim",
        ddim.add_options,
        "ddim.pipeline:DdimPipeline",
        add_more_options=ddim.add_sample_options,
        preset="configs/eda-dm/cifar10.yaml",
    ),
    Script(
        "sample_diffusion_ldm",
        ldm.add_unconditional_options,
        "ldm.pipeline:UnconditionalPipeline",
        preset="configs/eda-dm/bedroom.yaml",
    ),
    Script(
        "sample_diffusion_ldm_imagenet",
        ldm.add_class_options,
        "ldm.conditional:ClassPipeline",
        preset="configs/eda-dm/imagenet.yaml",
    ),
    Script(
        "sample_diffusion_ldm_bedroom",
        ldm.add_lsun_options,
        "ldm.pipeline:UnconditionalPipeline",
        preset="configs/eda-dm/bedroom.yaml",
        resume=False,
    ),
    Script(
        "sample_diffusion_ldm_church",
        ldm.add_lsun_options,
        "ldm.pipeline:UnconditionalPipeline",
        preset="configs/eda-dm/church.yaml",
        resume=False,
    ),
    Script(
        "txt2img",
        ldm.add_text_options,
        "ldm.conditional:TextPipeline",
        folder=("--outdir", "-l", "--logdir"),
        preset="configs/eda-dm/stable-diffusion.yaml",
    ),
    Script(
        "sample_txt2img",
        ldm.add_caption_options,
        "ldm.conditional:CaptionPipeline",
        preset="configs/eda-dm/stable-diffusion.yaml",
    ),
    Script(
        "sample_pipeline",
        add_pipeline_options,
        "qdiff.diffusers_backend.pipeline:DiffusersPipeline",
        also_import=("ldm.diffusers_networks",),
    ),
)
SCRIPTS: Mapping[str, Script] = MappingProxyType({script.name: script for script in _ROWS})
