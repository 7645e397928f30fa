"""Compare the time, memory and file size of a network in float, simulated and in real runtimes, in one run.

    python scripts/benchmark.py --config configs/digits.yml --use_pretrained --timesteps 20 --ptq --weight_bit 8 \\
        --quant_act --cali_ckpt runs/w8a8/quantized.safetensors --measure sampling --out runs/benchmark.json
    python scripts/benchmark.py --config configs/cifar10.yml --random --weight_bit 4 --threads 2
    python scripts/benchmark.py --like txt2img --config configs/stable-diffusion/v1-inference.yaml --random \\
        --quant_mode dynamic --batch 1 --repeats 0 --runtimes float,torch

Every variant loads its file in its own process; the processes take turns. --measure call times one call of the network;
--measure sampling times all sampling steps of one batch, without decoding. --repeats 0 measures only memory and files.
--like names the sampling script whose model and sampler options follow. --random uses random weights and ranges of
random inputs, W8A8 unless options say otherwise: time and memory need no trained weights. --document puts the table
between '<!-- table benchmark -->' and '<!-- end of table benchmark -->' in a markdown file.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import sys

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.ptq import add_ptq_options
from qdiff.cli.script import parser_like


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = parser_like(__doc__, arguments, SCRIPTS)
    add_ptq_options(parser, resume=False)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--random", action="store_true", help="random weights and ranges instead of --cali_ckpt")
    group.add_argument("--measure", choices=["call", "sampling"], default="call", help="what one turn measures")
    group.add_argument("--batch", type=int, default=8, help="samples per network call, or images per sampling")
    group.add_argument("--repeats", type=int, default=10, help="turns per variant; 0 measures only memory and files")
    group.add_argument("--threads", type=int, help="threads of torch and of the runtimes (default: torch's)")
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

    run_benchmark(args, arguments, SCRIPTS)


if __name__ == "__main__":
    main()
