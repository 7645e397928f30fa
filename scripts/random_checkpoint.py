"""Write a latent diffusion model with random weights, to measure time and memory without the released weights.

    python scripts/random_checkpoint.py --config configs/stable-diffusion/v1-inference.yaml --out runs/sd
    python scripts/txt2img.py --config runs/sd/config.yaml --ckpt runs/sd/model.safetensors --H 128 --W 128

The folder gets model.safetensors (float16) and config.yaml; a text encoder gets the tokenizer of the bundled digits
model, so that no download is needed. Images of such a model are noise.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--config", required=True, help="a config of configs/latent-diffusion or configs/stable-diffusion"
    )
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)

    from ldm.random_weights import write_random_model

    print(write_random_model(args.config, args.out, args.seed))


if __name__ == "__main__":
    main()
