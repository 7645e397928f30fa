"""Check a GPU: run the GPU tests, compare the demo with the CPU's numbers, and measure the full-size networks.

    make gpu-check PYTHON=python3
    python scripts/gpu_check.py --device cpu --small --out runs/gpu-check-cpu

It takes at most 8 minutes and installs nothing. Every part runs in its own process with its own time limit; a part that
fails, or for which a package is missing, is a line of the table. The table goes to stdout and, with all results as
JSON, into the folder --out. --small uses small networks and few images, to try the command itself. See docs/gpu.md.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--out", default="runs/gpu-check", help="folder of table.md and table.json")
    parser.add_argument("--device", default="cuda", help="e.g. cuda:0, or cpu to try the command")
    parser.add_argument("--small", action="store_true", help="small networks, few images, no comparison")
    parser.add_argument("--parts", help="names separated by commas (default: all of qdiff/benchmark/gpu_check.py)")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # used in the process of a part
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    from qdiff.benchmark.gpu_check import run_check, run_part

    if args.part is not None:
        run_part(args.part, args, SCRIPTS)
    elif not run_check(args):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
