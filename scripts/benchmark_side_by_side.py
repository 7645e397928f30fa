"""Measure how runs on one machine slow each other down: one sampling command alone, then several in parallel.

    python scripts/benchmark_side_by_side.py --runs 2 --threads 2 --repeats 3 -- sample_diffusion_ddim \\
        --config configs/digits.yml --use_pretrained --timesteps 20 --max_images 16 --ptq --weight_bit 4 --quant_act \\
        --act_bit 8 --cali_st 20 --cali_n 16 --cali_iters 50 --cali_iters_a 50 --device cpu

Every run has its own temporary folder; its phases are those of run.json. Idle threads sleep unless the environment says
otherwise: OMP_WAIT_POLICY=ACTIVE before the command shows the cost of spinning.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import tempfile
from pathlib import Path

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser
from qdiff.errors import require_at_least


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=int, default=2, help="number of parallel runs")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions, alone and in parallel")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads per run")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- SCRIPT OPTIONS, for a sampling script")
    args = parser.parse_args(arguments)
    for option, least in (("runs", 2), ("repeats", 1), ("threads", 1)):
        require_at_least(least, {f"--{option}": getattr(args, option)})
    return args


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    from qdiff.benchmark.machine import describe_machine
    from qdiff.benchmark.side_by_side import check_command, markdown, measure_side_by_side

    command, machine = check_command(args.command, SCRIPTS), describe_machine(args.threads)
    with tempfile.TemporaryDirectory(prefix="side-by-side-") as folder:
        phases = measure_side_by_side(command, Path(folder), args.runs, args.repeats, args.threads)
    print(markdown(phases, command, args.runs, args.repeats, machine))


if __name__ == "__main__":
    main()
