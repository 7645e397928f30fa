"""The options of the latent diffusion command lines, with the names of the published scripts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from qdiff.errors import UserError


def add_unconditional_options(
    parser: argparse.ArgumentParser, checkpoint: str = "--resume_base", seed: int | None = None, count: int = 50000
) -> None:
    """Model and sampler of the unconditional scripts.

    Args:
        checkpoint: long name of the option for the float checkpoint, besides ``-r``.
        seed: default seed; None makes the option required.
        count: default number of images.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "-r",
        checkpoint,
        dest="resume_base",
        nargs="?",
        help="checkpoint with config.yaml next to it, or its folder (default: the bundled digits model)",
    )
    group.add_argument("--seed", type=int, default=seed, required=seed is None)
    group.add_argument("-n", "--n_samples", type=int, nargs="?", const=count, default=count, help="number of images")
    group = parser.add_argument_group("sampler")
    group.add_argument("-c", "--custom_steps", type=int, nargs="?", const=50, default=50, help="steps of the sampler")
    group.add_argument("-e", "--eta", type=float, nargs="?", const=1.0, default=1.0, help="η of DDIM")
    group.add_argument("-v", "--vanilla_sample", action="store_true", help="ancestral sampling over all training steps")
    group.add_argument("--dpm", action="store_true", help="DPM-Solver++ 2M")
    _add_sampler_option(group)
    group.add_argument("--a_min_max", action="store_true", help="min-max ranges for activations")


def add_guided_options(
    parser: argparse.ArgumentParser, config: str, ckpt: str, steps: int, scale: float, seed: int, n_samples: str
) -> None:
    """Model and sampler of the class- and text-conditional scripts.

    Args:
        config, ckpt: the big model's files, used if both exist; otherwise the bundled model is used.
        n_samples: help text of ``--n_samples``.
    """
    group = parser.add_argument_group("model")
    group.add_argument("--config", help=f"model config (default: {config}, or the bundled digits model)")
    group.add_argument("--ckpt", help=f"model checkpoint (default: {ckpt}, or the bundled digits model)")
    group.add_argument("--seed", type=int, default=seed)
    group.add_argument(
        "--precision", choices=["full", "autocast"], default="autocast", help="autocast is half precision on CUDA"
    )
    group.add_argument("--no_grad_ckpt", action="store_true", help="keep activations instead of recomputing them")
    group = parser.add_argument_group("sampler")
    group.add_argument("--ddim_steps", type=int, default=steps)
    group.add_argument("--ddim_eta", type=float, default=0.0)
    _add_sampler_option(group)
    group.add_argument("--scale", type=float, default=scale, help="scale of classifier-free guidance")
    group.add_argument("--n_samples", type=int, default=3, help=n_samples)
    group.add_argument("--n_rows", type=int, default=0, help="columns of the grid (default: about square)")
    group.add_argument("--skip_grid", action="store_true", help="write no grid")
    group.add_argument("--skip_save", action="store_true", help="write only the grid, no single images")


def _add_sampler_option(group: argparse._ArgumentGroup) -> None:
    from qdiff.sampling.registry import SAMPLERS  # loads torch

    # Clipping x_0 to [−1, 1] would damage latents.
    names = [row.name for row in SAMPLERS.values() if not row.clips]
    group.add_argument("--sampler", choices=names, help="sampler by name (default: ddim)")


def chosen_sampler(args: argparse.Namespace, flags: Mapping[str, str]) -> str:
    """Return the name of the sampler that the options select.

    Args:
        flags: options of the published scripts → sampler name.

    Raises:
        UserError: more than one sampler is given.
    """
    given = [name for name in (*flags, "sampler") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} contradict each other; leave one of them out")
    return args.sampler or (flags[given[0]] if given else "ddim")


def add_class_options(parser: argparse.ArgumentParser) -> None:
    """Model and sampler of scripts/sample_diffusion_ldm_imagenet.py."""
    add_guided_options(parser, CLASS_CONFIG, CLASS_CKPT, 20, 3.0, 1234, "number of images; classes are used in turn")
    parser.add_argument("--n_batch", type=int, default=2, help="images per batch")
    parser.add_argument("--dataset", nargs="?", help="accepted but not used; sampling needs no images")


def add_lsun_options(parser: argparse.ArgumentParser) -> None:
    """Model and sampler of EDA-DM's scripts for LSUN."""
    add_unconditional_options(parser, checkpoint="--resume", seed=1234, count=10000)
    parser.add_argument("--dataset", nargs="?", help="accepted but not used; sampling needs no images")


def add_text_options(parser: argparse.ArgumentParser, seed: int = 42, n_iter: int = 2) -> None:
    """Model and sampler of the text-conditional scripts.

    Args:
        seed, n_iter: default values.
    """
    add_guided_options(parser, TEXT_CONFIG, TEXT_CKPT, 50, 7.5, seed, "images per prompt, and images per batch")
    group = parser.add_argument_group("prompts and sizes")
    group.add_argument("--prompt", nargs="?", help="text prompt (default: a virus monster playing guitar, or a digit)")
    group.add_argument("--from-file", help="file with one prompt per line, or COCO's captions_val2014.json")
    group.add_argument("--cali_prompts", help="file of prompts for recording the calibration set (default: the run's)")
    group.add_argument("--n_iter", type=int, default=n_iter, help="how often to go through the prompts")
    group.add_argument("--max_images", type=int, help="maximum number of images")
    group.add_argument("--fixed_code", action="store_true", help="use the same starting noise in every batch")
    group.add_argument("--plms", action="store_true")
    group.add_argument("--dpm", action="store_true", help="DPM-Solver++ 2M")
    group.add_argument("--laion400m", action="store_true", help="not supported (the model needs a BERT encoder)")
    group.add_argument("--H", type=int, help="image height in pixels (default: the model's)")
    group.add_argument("--W", type=int, help="image width in pixels (default: the model's)")
    group.add_argument("--C", type=int, help="latent channels (default: the model's)")
    group.add_argument("--f", type=int, help="downsampling factor (default: the model's)")


def add_caption_options(parser: argparse.ArgumentParser) -> None:
    """Model and sampler of EDA-DM's scripts/sample_txt2img.py, where ``--n_samples`` is the number of images."""
    add_text_options(parser, seed=1234, n_iter=1)
    parser.add_argument("--n_batch", type=int, default=2, help="images per batch")
    parser.add_argument("--dataset", nargs="?", help="accepted but not used; sampling needs no images")


CLASS_CONFIG, CLASS_CKPT = "configs/latent-diffusion/cin256-v2.yaml", "models/ldm/cin256/model.ckpt"
TEXT_CONFIG, TEXT_CKPT = "configs/stable-diffusion/v1-inference.yaml", "models/ldm/stable-diffusion-v1/model.ckpt"
