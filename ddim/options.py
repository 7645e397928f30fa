"""The options of the DDIM command lines."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Model and sampler of a DDIM model."""
    add_model_options(parser)
    add_sampler_options(parser)


def add_sample_options(parser: argparse.ArgumentParser) -> None:
    """Model and sampler of a DDIM model, and what to sample."""
    add_options(parser)
    parser.add_argument("--sequence", action="store_true", help="write the predicted x_0 at every step, for 8 images")
    parser.add_argument("--max_images", type=int, default=50000)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The DDIM model and the source of its float weights."""
    group = parser.add_argument_group("model")
    group.add_argument("--config", required=True, help="model config, e.g. configs/cifar10.yml")
    group.add_argument("--use_pretrained", action="store_true", help="use the config's released or bundled weights")
    group.add_argument("--model_dir", help="folder of the released weights (default: the cache)")
    group.add_argument("--ckpt", help="file with the float weights")
    group.add_argument("--seed", type=int, default=1234)


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """The sampler of a DDIM model."""
    from qdiff.sampling.registry import sample_types  # loads torch

    group = parser.add_argument_group("sampler")
    kinds = list(sample_types())
    group.add_argument("--sample_type", choices=kinds, default="generalized", help="generalized is DDIM")
    group.add_argument("--skip_type", choices=["uniform", "quad"], default="uniform")
    group.add_argument("--timesteps", type=int, default=1000)
    group.add_argument("--eta", type=float, default=0.0, help="η of DDIM")
    group.add_argument("--dpm_order", type=int, choices=[1, 2, 3], default=2)
    group.add_argument("--dpm_method", choices=["multistep", "singlestep"], default="multistep")
