"""Write a calibrated network as an ONNX model with explicit quantize and dequantize pairs, for any ONNX runtime.

    python scripts/export.py --config configs/digits.yml --use_pretrained --timesteps 20 --ptq --weight_bit 4 \\
        --quant_act --act_bit 8 --split --cali_ckpt runs/w4a8/quantized.safetensors --out runs/w4a8/model.onnx

Without --ptq the float network is written. --like names the sampling script whose model options follow.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import sys
from pathlib import Path

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.ptq import add_ptq_options
from qdiff.cli.script import LIKE, load_object, parser_like


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = parser_like(__doc__, arguments)
    add_ptq_options(parser, resume=False)
    parser.add_argument("--batch_size", type=int, help="accepted: the model takes any batch")
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
    from qdiff.io.tensor_files import is_pickle
    from qdiff.quant_model import QuantModel

    model = load_object(LIKE[args.like][1])(args)
    plan = resolve_ptq(args, model.weight_range, model.act_range)
    if plan is not None and plan.action != "load":
        raise UserError("a calibrated checkpoint is what is exported; give --cali_ckpt PATH")
    import_onnx()
    if plan is not None:
        check_exportable(plan.quant)
        is_pickle(Path(plan.checkpoint))  # it is there and can be read
    check_writable(args.out)
    model.load(torch.device("cpu"))
    for note in model.notes:
        print(note, file=sys.stderr)
    if plan is None:
        qnn, notes = wrapped(model.network), {"method": "float"}
    else:
        qnn, notes = QuantModel(model.network, plan.quant), {"checkpoint": sha256(plan.checkpoint)}
        load_checkpoint(qnn, plan.checkpoint, probe=model.probe)
    for path in export_onnx(qnn, args.out, model.input_shape, model.context_shape, notes):
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
