"""Write a calibrated network for other programs: as ONNX for any ONNX runtime, or its weights for ComfyUI or diffusers.

    python scripts/export.py --config configs/digits.yml --use_pretrained --timesteps 20 --ptq --weight_bit 4 \\
        --quant_act --act_bit 8 --split --cali_ckpt runs/w4a8/quantized.safetensors --out runs/w4a8/model.onnx

    python scripts/export.py --like txt2img --ckpt sd-v1-4.ckpt --ptq --weight_bit 4 --cali_ckpt w4.safetensors \\
        --format comfyui --convolutions dequantized --prefix model.diffusion_model. --out comfy.safetensors

ONNX is an integer model with explicit quantize and dequantize pairs; without --ptq, the float network is exported. The
other formats (docs/deployment.md) hold linear layers as integers, and no quantization of activations. --like names the
sampling script whose model options follow.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.ptq import add_ptq_options
from qdiff.cli.script import parser_like

if TYPE_CHECKING:
    from pathlib import Path

    from qdiff.cli.options.ptq import PtqPlan
    from qdiff.pipeline import Pipeline
    from qdiff.quant_model import QuantModel

    Write = Callable[[QuantModel, Pipeline, dict], list[Path]]

ONNX = "onnx"
OF_WEIGHTS = ("compute_dtype", "convolutions", "linears", "as_floats", "prefix")  # fields of `WriteOptions`


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = parser_like(__doc__, arguments, SCRIPTS)
    add_ptq_options(parser, resume=False)
    parser.add_argument("--batch_size", type=int, help="accepted; the model takes any batch size")
    parser.add_argument("--out", required=True, help="the file to write, or the folder for nunchaku_lite")
    from qdiff.deploy.weight_format import DEQUANTIZED, DTYPES, REFUSED
    from qdiff.deploy.weight_formats import FORMATS

    titles = "; ".join(f"{row.name}: {row.title}" for row in FORMATS.values())
    parser.add_argument("--format", choices=[ONNX, *FORMATS], default=ONNX, help=titles)
    group = parser.add_argument_group("weight formats (all but onnx)")
    group.add_argument("--compute_dtype", choices=list(DTYPES), help="dtype of the file's floats; default bfloat16")
    for name, kind in (("convolutions", "convolutions"), ("linears", "linear layers")):
        about = f"quantized {kind} that do not fit the format: an error (default), or stored as floats"
        group.add_argument(f"--{name}", choices=[REFUSED, DEQUANTIZED], help=about)
    group.add_argument("--as_floats", nargs="+", metavar="LAYER", help="quantized layers to store as floats anyway")
    group.add_argument("--prefix", help="comes before all names, e.g. model.diffusion_model.")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    import torch

    from qdiff.checkpoint import load_checkpoint
    from qdiff.cli.options.ptq import resolve_ptq
    from qdiff.cli.quantize import wrap_network
    from qdiff.cli.runtime import wrapped
    from qdiff.errors import UserError
    from qdiff.io.files import sha256
    from qdiff.io.tensor_files import check_readable

    pipeline = SCRIPTS[args.like].pipeline_of(args)
    plan = resolve_ptq(args, pipeline.weight_range, pipeline.act_range)
    if plan is not None and plan.action != "load":
        raise UserError("export needs a calibrated checkpoint; give --cali_ckpt PATH")
    write = _onnx_writer(args, plan) if args.format == ONNX else _weight_writer(args, plan)
    if plan is not None:
        check_readable(plan.checkpoint)
    pipeline.load(torch.device("cpu"))
    for note in pipeline.notes:
        print(note, file=sys.stderr)
    if plan is None:
        qnn, notes = wrapped(pipeline.network), {"method": "float"}
    else:
        qnn, notes = wrap_network(pipeline.network, plan), {"checkpoint": sha256(plan.checkpoint)}
        load_checkpoint(qnn, plan.checkpoint, probe=pipeline.probe)
    for path in write(qnn, pipeline, notes):
        print(f"{path}: {path.stat().st_size} bytes")


def _onnx_writer(args: argparse.Namespace, plan: PtqPlan | None) -> Write:
    """Check the options of ONNX, and return what writes the file."""
    from qdiff.deploy.onnx_export import check_exportable, export_onnx, import_onnx
    from qdiff.errors import UserError
    from qdiff.io.files import check_writable

    if given := [name for name in OF_WEIGHTS if getattr(args, name) is not None]:
        raise UserError(f"--{given[0]} has no effect on ONNX; leave it out, or give another --format")
    import_onnx()
    if plan is not None:
        check_exportable(plan.quant)
    check_writable(args.out)
    return lambda qnn, pipeline, notes: export_onnx(qnn, args.out, pipeline.input_shape, pipeline.context_shape, notes)


def _weight_writer(args: argparse.Namespace, plan: PtqPlan | None) -> Write:
    """Check the options of a weight format, and return what writes its files and prints its notes."""
    from pathlib import Path

    from qdiff.deploy.weight_format import WriteOptions
    from qdiff.deploy.weight_formats import FORMATS
    from qdiff.errors import UserError

    if plan is None:
        raise UserError(f"--format {args.format} is for quantized weights; add --ptq and --cali_ckpt PATH")
    given = {name: getattr(args, name) for name in OF_WEIGHTS if getattr(args, name) is not None}
    options = WriteOptions(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    chosen, path = FORMATS[args.format], Path(args.out)
    chosen.check_target(path, options)

    def write(qnn: QuantModel, pipeline: Pipeline, notes: dict) -> list[Path]:
        written = chosen.write(pipeline.under_own_names(qnn), path, options)
        for note in written.notes:
            print(note, file=sys.stderr)
        return list(written.files)

    return write


if __name__ == "__main__":
    main()
