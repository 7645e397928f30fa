"""Write a float model in the layout of the diffusers library, as a pipeline's folder, or such a folder as a checkpoint.

    python scripts/convert.py --config configs/digits.yml --use_pretrained --out runs/digits
    python scripts/convert.py --like txt2img --config models/ldm/digits_text/config.yaml \\
        --ckpt models/ldm/digits_text/model.safetensors --out runs/digits_text
    python scripts/convert.py runs/digits_text --to-papers --out runs/back/model.safetensors

--like names the sampling script whose model options follow. --to-papers writes config.yaml beside the checkpoint.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import sys

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser
from qdiff.cli.script import parser_like

BACK = "--to-papers"


def parse_args(arguments: list[str]) -> argparse.Namespace:
    if BACK in arguments:
        parser = Parser(__doc__)
        parser.add_argument("folder", help="the folder of a pipeline")
        parser.add_argument("--out", required=True, help="the checkpoint to write (.safetensors)")
    else:
        parser = parser_like(__doc__, arguments, SCRIPTS)
        parser.add_argument("--batch_size", type=int, help="accepted; nothing is sampled")
        parser.add_argument("--out", required=True, help="the folder to write; it must be missing or empty")
    parser.add_argument(BACK, action="store_true", help="convert FOLDER, which is named before it, to a checkpoint")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    if args.to_papers:
        from ddim import diffusers_folder
        from ldm import from_diffusers
        from qdiff.io.diffusers_files import component_names

        latent = not component_names(args.folder).keys().isdisjoint(from_diffusers.VAES)
        print((from_diffusers if latent else diffusers_folder).read_pipeline(args.folder, args.out))
        return
    pipeline = SCRIPTS[args.like].pipeline_of(args)
    line = pipeline.write_diffusers(args.out)
    for note in pipeline.notes:
        print(note, file=sys.stderr)
    print(line)


if __name__ == "__main__":
    main()
