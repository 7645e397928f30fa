"""The options of scripts/sample_pipeline.py and scripts/quantize_pipeline.py: which pipeline, and how it is called."""

from __future__ import annotations

import argparse


def add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    """A diffusers pipeline, its scheduler, and what it is asked for."""
    group = parser.add_argument_group("pipeline")
    group.add_argument("pipeline", metavar="PIPELINE", help="folder with model_index.json")
    group.add_argument("--component", help="the network to quantize (default: unet or transformer)")
    group.add_argument("--seed", type=int, default=1234)
    group.add_argument(
        "--precision", choices=["full", "autocast"], default="autocast", help="autocast is half precision on CUDA"
    )
    group = parser.add_argument_group("sampler")
    group.add_argument("--scheduler", help="class of diffusers' schedulers, e.g. DDIMScheduler (default: the folder's)")
    group.add_argument("--steps", type=int, default=50, help="num_inference_steps")
    group.add_argument("--guidance_scale", type=float, help="scale of guidance (default: the pipeline's)")
    group = parser.add_argument_group("what to sample")
    group.add_argument("-n", "--n_samples", type=int, default=4, help="number of images")
    group.add_argument("--prompt", help="text prompt of all images")
    group.add_argument("--from-file", help="file with one prompt per line, or COCO's captions; used in turn")
    group.add_argument("--negative_prompt", help="what guidance leads away from")
    group.add_argument("--classes", help="class numbers separated by commas, used in turn (default: all)")
    group.add_argument("--height", type=int, help="image height in pixels (default: the pipeline's)")
    group.add_argument("--width", type=int, help="image width in pixels (default: the pipeline's)")
