"""Write a calibrated network as an ONNX model with explicit quantize and dequantize pairs, for any ONNX runtime.

    python scripts/export.py --config configs/digits.yml --use_pretrained --timesteps 20 --ptq --weight_bit 4 \\
        --quant_act --act_bit 8 --split --cali_ckpt runs/w4a8/quantized.safetensors --out runs/w4a8/model.onnx

Without --ptq the float network is exported. --like names the sampling script whose model options follow.
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
    parser.add_argument("--batch_size", type=int, help="accepted; the model takes any batch size")
    parser.add_argument("--out", required=True, help="the file to write (.onnx)")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    import torch

    from qdiff.checkpoint import load_checkpoint
    from qdiff.cli.options.ptq import resolve_ptq
    from qdiff.cli.runtime import wrapped
    from qdiff.deploy.onnx_export import check_exportable, export_onnx, import_onnx
    from qdiff.errors import UserError
    from qdiff.io.files import check_writable, sha256
    from qdiff.io.tensor_files import check_readable
    from qdiff.quant_model import QuantModel

    pipeline = SCRIPTS[args.like].pipeline_of(args)
    plan = resolve_ptq(args, pipeline.weight_range, pipeline.act_range)
    if plan is not None and plan.action != "load":
        raise UserError("export needs a calibrated checkpoint; give --cali_ckpt PATH")
    import_onnx()
    if plan is not None:
        check_exportable(plan.quant)
        check_readable(plan.checkpoint)
    check_writable(args.out)
    pipeline.load(torch.device("cpu"))
    for note in pipeline.notes:
        print(note, file=sys.stderr)
    if plan is None:
        qnn, notes = wrapped(pipeline.network), {"method": "float"}
    else:
        qnn, notes = QuantModel(pipeline.network, plan.quant), {"checkpoint": sha256(plan.checkpoint)}
        load_checkpoint(qnn, plan.checkpoint, probe=pipeline.probe)
    for path in export_onnx(qnn, args.out, pipeline.input_shape, pipeline.context_shape, notes):
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
