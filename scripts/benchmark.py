"""Compare the speed and memory of a network in float, simulated, and in ONNX runtimes, in alternation in one run.

    python scripts/benchmark.py --config configs/digits.yml --use_pretrained --timesteps 20 --ptq --weight_bit 8 \\
        --quant_act --cali_ckpt runs/w8a8/quantized.safetensors --batch 8 --out runs/benchmark.json
    python scripts/benchmark.py --config configs/cifar10.yml --timesteps 100 --random --batch 8

--like names the sampling script whose model and sampler options follow. --random takes random weights and min-max
ranges of a few random inputs, W8A8 unless the options say otherwise: time and memory need no trained weights.
--document keeps the table between '<!-- table benchmark -->' and its end in a markdown file.
"""

from __future__ import annotations

import argparse
import sys

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.ptq import add_ptq_options
from qdiff.cli.script import LIKE, load_object, parser_like


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = parser_like(__doc__, arguments)
    add_ptq_options(parser, resume=False)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--random", action="store_true", help="random weights and ranges instead of --cali_ckpt")
    group.add_argument("--batch", type=int, default=8, help="samples in a network call")
    group.add_argument("--repeats", type=int, default=10, help="turns of each variant")
    group.add_argument("--threads", type=int, help="of torch and of the runtimes (default: torch's)")
    group.add_argument("--runtimes", help="names separated by commas (default: all); see qdiff/cli/benchmark.py")
    group.add_argument("--out", help="JSON file to write")
    group.add_argument("--document", help="markdown file whose block '<!-- table NAME -->' becomes the table")
    group.add_argument("--table", default="benchmark", help="NAME of that block")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    from qdiff.cli.benchmark_run import run_benchmark

    run_benchmark(args, load_object(LIKE[args.like][1]))


if __name__ == "__main__":
    main()
