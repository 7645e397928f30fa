"""Write a model in the layout of the diffusers library, as a pipeline's folder, or such a folder as a checkpoint.

    python scripts/convert.py --config configs/digits.yml --use_pretrained --out runs/digits
    python scripts/convert.py --like txt2img --config models/ldm/digits_text/config.yaml \\
        --ckpt models/ldm/digits_text/model.safetensors --out runs/digits_text
    python scripts/convert.py runs/digits_text --to-papers --out runs/back/model.safetensors

--like names the sampling script whose model options follow. With --ptq, the UNet is that of a quantized checkpoint:

    python scripts/convert.py --like txt2img --ptq --weight_bit 4 --quant_act --act_bit 8 --cali_ckpt sd_w4a8.pth \\
        --resume --out runs/sd_w4a8

--to-papers writes config.yaml beside the checkpoint, and quantized.safetensors for a quantized UNet.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import sys

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser
from qdiff.cli.script import parser_like, script_like

BACK = "--to-papers"


def parse_args(arguments: list[str]) -> argparse.Namespace:
    if BACK in arguments:
        parser = Parser(__doc__)
        parser.add_argument("folder", help="the folder of a pipeline")
        parser.add_argument("--out", required=True, help="the checkpoint to write (.safetensors)")
    else:
        from qdiff.cli.options.ptq import add_ptq_options

        parser, script = parser_like(__doc__, arguments, SCRIPTS), script_like(arguments, SCRIPTS)
        add_ptq_options(parser, resume=script is None or script.resume)
        parser.add_argument("--batch_size", type=int, help="accepted; nothing is sampled")
        parser.add_argument("--out", required=True, help="the folder to write; it must be missing or empty")
    parser.add_argument(BACK, action="store_true", help="convert FOLDER, which is named before it, to a checkpoint")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    (_to_papers if args.to_papers else _to_diffusers)(args)


def _to_diffusers(args: argparse.Namespace) -> None:
    from qdiff.cli.options.ptq import ignored_options, resolve_ptq
    from qdiff.errors import UserError
    from qdiff.io.diffusers_files import component_of, import_diffusers

    pipeline = SCRIPTS[args.like].pipeline_of(args)
    plan, make_unet = resolve_ptq(args, pipeline.weight_range, pipeline.act_range), component_of
    if plan is not None:
        if plan.action != "load":
            raise UserError("a pipeline is converted with a finished checkpoint; give --cali_ckpt PATH")
        import_diffusers()
        from qdiff.diffusers_backend.convert_unet import UnetOfCheckpoint

        make_unet = UnetOfCheckpoint(plan.quant, plan.checkpoint, pipeline.probe, pipeline.name)
    line = pipeline.write_diffusers(args.out, make_unet)
    for note in (*pipeline.notes, *ignored_options(args)):
        print(note, file=sys.stderr)
    print(line)


def _to_papers(args: argparse.Namespace) -> None:
    from ddim import diffusers_folder
    from ldm import from_diffusers
    from qdiff.cli.options.words import quantization_words
    from qdiff.io.diffusers_files import component_names, import_diffusers, tensors_of

    latent = not component_names(args.folder).keys().isdisjoint(from_diffusers.VAES)
    import_diffusers()
    from qdiff.diffusers_backend.convert_unet import CheckpointOfUnet, is_quantized_folder

    read_pipeline = (from_diffusers if latent else diffusers_folder).read_pipeline
    if not is_quantized_folder(args.folder):
        print(read_pipeline(args.folder, args.out, tensors_of))
        return
    unet = CheckpointOfUnet(args.out)
    print(read_pipeline(args.folder, args.out, unet))
    unet.save()
    words = " ".join(quantization_words(unet.qnn.config))
    print(f"{unet.path}: its quantized UNet, for sampling with {words} --cali_ckpt {unet.path}")


if __name__ == "__main__":
    main()
