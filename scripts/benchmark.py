"""Compare the time, memory and files of a network in float, simulated and in real runtimes, in one run.

    python scripts/benchmark.py --config configs/digits.yml --use_pretrained --timesteps 20 --ptq --weight_bit 8 \\
        --quant_act --cali_ckpt runs/w8a8/quantized.safetensors --measure sampling --out runs/benchmark.json
    python scripts/benchmark.py --config configs/cifar10.yml --random --weight_bit 4 --threads 2
    python scripts/benchmark.py --like txt2img --config configs/stable-diffusion/v1-inference.yaml --random \\
        --quant_mode dynamic --batch 1 --repeats 0 --runtimes float,torch

Every variant loads its file in a process of its own; the processes take turns. --measure call times a call of the
network; --measure sampling the sampler's whole way for one batch, without decoding. --repeats 0 measures memory and
files alone. --like names the sampling script whose model and sampler options follow. --random takes random weights
and ranges of random inputs, W8A8 unless options say otherwise: time and memory need no trained weights. --document
puts the table between '<!-- table benchmark -->' and '<!-- end of table benchmark -->' in a markdown file.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import sys

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.ptq import add_ptq_options
from qdiff.cli.script import parser_like


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = parser_like(__doc__, arguments)
    add_ptq_options(parser, resume=False)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--random", action="store_true", help="random weights and ranges instead of --cali_ckpt")
    group.add_argument("--measure", choices=["call", "sampling"], default="call", help="what a turn is")
    group.add_argument("--batch", type=int, default=8, help="samples in a network call, images in a sampling")
    group.add_argument("--repeats", type=int, default=10, help="turns of each variant; 0: memory and files alone")
    group.add_argument("--threads", type=int, help="of torch and of the runtimes (default: torch's)")
    group.add_argument("--runtimes", help="names separated by commas (default: all of qdiff/benchmark/variants.py)")
    group.add_argument("--weight_cache", type=float, default=0.0, help="MiB of dequantized weights that torch keeps")
    group.add_argument("--out", help="JSON file to write")
    group.add_argument("--document", help="markdown file whose block '<!-- table NAME -->' becomes the table")
    group.add_argument("--table", default="benchmark", help="NAME of that block")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse_args(arguments)
    from qdiff.benchmark.run import run_benchmark

    run_benchmark(args, arguments)


if __name__ == "__main__":
    main()
