"""The bundled models for the tests of scripts/convert.py: how they are sampled here, and as pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from families import SCRIPTS
from torch import Tensor

from qdiff.cli.options.parser import Parser
from qdiff.sampling import ImageNoise

SEED, STEPS, COUNT, SCALE = 7, 5, 2, 3.0
PROMPT = "a handwritten three"


@torch.no_grad()
def by_hand(pipeline: Any, x: Tensor) -> Tensor:
    """Sample an unconditional pipeline, which takes no starting noise, from x_T; return images in [−1, 1]."""
    pipeline.scheduler.set_timesteps(STEPS)
    for t in pipeline.scheduler.timesteps:
        x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    if "vqvae" in pipeline.components:
        x = pipeline.vqvae.decode(x / pipeline.vqvae.config.scaling_factor).sample
    return x.clamp(-1, 1)


def by_call(*condition: object) -> Callable[[Any, Tensor], Tensor]:
    """Return a function as `by_hand` for a pipeline with conditions."""

    def sample(pipeline: Any, x: Tensor) -> Tensor:
        options = {"latents": x, "num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "pt"}
        return pipeline(*condition, **options).images * 2 - 1

    return sample


@dataclass(frozen=True)
class Bundled:
    """A bundled model.

    Attributes:
        script: its sampling script.
        pipeline: the class of its pipeline in diffusers.
        model: options of the script for the model.
        options: options of the script for the sampler and the number of images.
        sample: ``(pipeline of diffusers, x_T)`` returns images [N, C, H, W] in [−1, 1].
        again: ``(checkpoint)`` returns ``model`` for a checkpoint with config.yaml beside it.
    """

    script: str
    pipeline: str
    model: tuple[object, ...]
    options: tuple[object, ...]
    sample: Callable[[Any, Tensor], Tensor]
    again: Callable[[Any], tuple[object, ...]]

    def pipeline_of_ours(self) -> Any:
        """Return our pipeline, loaded."""
        script, parser = SCRIPTS[self.script], Parser(None)
        (script.add_more_options or script.add_options)(parser)
        parser.add_argument("--batch_size", type=int, default=COUNT)
        made = script.pipeline_of(parser.parse_args([str(word) for word in (*self.model, *self.options)]))
        made.load(torch.device("cpu"))
        return made

    def noise(self, pipeline: Any) -> Tensor:
        """Return x_T of the images of the script."""
        config = pipeline.unet.config
        return ImageNoise(SEED, range(COUNT), (config.in_channels, config.sample_size, config.sample_size)).draw()


def _config_and_ckpt(path: Any) -> tuple[object, ...]:
    return "--config", path.with_name("config.yaml"), "--ckpt", path, *SEEDED


def _resume(path: Any) -> tuple[object, ...]:
    return "-r", path, *SEEDED


SEEDED = ("--seed", SEED)
UNCONDITIONAL = ("-n", COUNT, "-c", STEPS, "-e", 0.0)
GUIDED = ("--n_samples", COUNT, "--ddim_steps", STEPS, "--scale", SCALE)
MODELS = {
    "ddim": Bundled(
        "sample_diffusion_ddim",
        "DDIMPipeline",
        ("--config", "configs/digits.yml", "--use_pretrained", *SEEDED),
        ("--max_images", COUNT, "--timesteps", STEPS),
        by_hand,
        _config_and_ckpt,
    ),
    "vq": Bundled("sample_diffusion_ldm", "LDMPipeline", SEEDED, UNCONDITIONAL, by_hand, _resume),
    "kl": Bundled(
        "sample_diffusion_ldm", "LDMPipeline", ("-r", "models/ldm/digits_kl", *SEEDED), UNCONDITIONAL, by_hand, _resume
    ),
    "class": Bundled(
        "sample_diffusion_ldm_imagenet",
        "ClassConditionalLDMPipeline",
        SEEDED,
        GUIDED,
        by_call([0, 1]),
        _config_and_ckpt,
    ),
    "text": Bundled(
        "txt2img",
        "StableDiffusionPipeline",
        SEEDED,
        (*GUIDED, "--n_iter", 1, "--prompt", PROMPT),
        by_call([PROMPT] * COUNT),
        _config_and_ckpt,
    ),
}
