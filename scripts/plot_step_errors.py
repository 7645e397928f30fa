"""Show the effect of modulation: the error of ε at every sampling step with it, without parts of it, and without it.

    python scripts/plot_step_errors.py --config configs/digits.yml --use_pretrained --timesteps 20 \\
        --ptq --weight_bit 4 --quant_act --act_bit 3 --quant_mode dynamic \\
        --cali_ckpt runs/modiff-digits/w4a32/quantized.safetensors --out runs/step-errors.png

All variants get the inputs of the same sampling runs of the float model. The numbers are written next to the picture,
as JSON. --like names the sampling script whose model and sampler options follow.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import json
import sys
from pathlib import Path

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.ptq import add_ptq_options
from qdiff.cli.script import parser_like


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = parser_like(__doc__, arguments, SCRIPTS)
    add_ptq_options(parser, resume=False)
    parser.add_argument("--images", type=int, default=64, help="number of sampling runs to compare along")
    parser.add_argument("--batch_size", type=int, help="images per batch")
    parser.add_argument("--device", help="e.g. cpu, cuda:0 (default: CUDA if available)")
    parser.add_argument("--out", required=True, help="the picture to write (.png)")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    from qdiff.cli.step_errors import resolve, step_errors
    from qdiff.errors import UserError
    from qdiff.io.files import check_writable, written_whole
    from qdiff.report.step_error_plot import step_error_picture

    pipeline = SCRIPTS[args.like].pipeline_of(args)
    plan, numbers = resolve(args, pipeline), Path(args.out).with_suffix(".json")
    if Path(args.out).suffix != ".png":
        raise UserError(f"--out is {args.out}; give a name that ends in .png (the numbers go next to it as .json)")
    for path in (args.out, numbers):
        check_writable(path)
    found = step_errors(pipeline, plan, args.images, args.device)
    quant = plan.quant
    title = f"{pipeline.name}, W{quant.weight_bits}A{quant.act_bits}, one range per {quant.act_scale_per.value}"
    step_error_picture(found["errors"], found["timesteps"], args.out, title)
    with written_whole(numbers) as path:
        path.write_text(json.dumps({**found, "quant": quant.to_dict(), "seed": args.seed}, indent=1))
    for name, errors in found["errors"].items():
        share = f"{100 * found['fired'][name]:.0f} % of quantizer calls fired"
        print(f"{name:<30} mean {sum(errors) / len(errors):.2e}, last {errors[-1]:.2e}   {share}")
    print(f"{args.out}, {numbers}")


if __name__ == "__main__":
    main()
