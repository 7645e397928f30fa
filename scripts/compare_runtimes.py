"""Compare the runtimes with the simulated network: ε at every sampling step, and the images.

    python scripts/compare_runtimes.py --config configs/digits.yml --use_pretrained --timesteps 20 --seed 1234 \\
        --ptq --weight_bit 4 --quant_act --act_bit 8 --split --cali_ckpt runs/w4a8/quantized.safetensors \\
        --images 64 --out runs/w4a8/parity.json

At each step, every network gets the inputs of the simulated one; images are sampled by each network on its own. --like
names the sampling script whose model and sampler options follow.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import json
import sys

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.ptq import add_ptq_options
from qdiff.cli.script import parser_like


def parse_args(arguments: list[str]) -> argparse.Namespace:
    from qdiff.benchmark.parity import compared_runtimes

    parser = parser_like(__doc__, arguments, SCRIPTS)
    add_ptq_options(parser, resume=False)
    parser.add_argument("--images", type=int, default=64, help="images per network")
    parser.add_argument("--batch_size", type=int, help="images per batch")
    parser.add_argument("--device", help="e.g. cpu, cuda:0 (default: CUDA if available)")
    parser.add_argument(
        "--runtimes", help=f"names separated by commas: {', '.join(compared_runtimes())} (default: all available)"
    )
    parser.add_argument("--onnx", help="the exported model (default: exported into a temporary folder)")
    parser.add_argument("--out", help="JSON file to write, with the error at every step")
    parser.add_argument("--document", help="markdown file whose block '<!-- table NAME -->' becomes the table")
    parser.add_argument("--table", default="parity", help="NAME of that block")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    from qdiff.benchmark.parity import compare, markdown, resolve
    from qdiff.cli.document import DocumentBlock
    from qdiff.io.files import check_writable, written_whole

    pipeline = SCRIPTS[args.like].pipeline_of(args)
    plan, runtimes, skipped = resolve(args, pipeline)
    block = None if args.document is None else DocumentBlock(args.document, args.table)
    if args.out is not None:
        check_writable(args.out)
    for name, why in skipped.items():
        print(f"without {name}: {why}", file=sys.stderr)
    found = compare(pipeline, plan, runtimes, args.images, args.device, args.onnx)
    for note in pipeline.notes:
        print(note, file=sys.stderr)
    text = markdown(found, args.images)
    print(text)
    if args.out is not None:
        about = {"model": pipeline.name, "checkpoint": plan.checkpoint, "images": args.images, "seed": args.seed}
        with written_whole(args.out) as path:
            path.write_text(json.dumps({**about, "quant": plan.quant.to_dict(), "skipped": skipped, **found}, indent=1))
    if block is not None:
        block.replace(text)


if __name__ == "__main__":
    main()
