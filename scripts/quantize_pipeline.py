"""Quantize a diffusers pipeline and save it as a folder that plain diffusers loads.

    python scripts/quantize_pipeline.py FOLDER --out SMALL --prompt "a photo of a cat" --steps 50 --weight_bit 4 \\
        --quant_act --act_bit 8 --split --cali_st 20 --cali_n 16

    import qdiff
    pipe = DiffusionPipeline.from_pretrained("SMALL")

The calibration is that of scripts/sample_pipeline.py --ptq: it takes the same options, and repeating the command
continues an interrupted one.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import json

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser, add_run_options

SCRIPT = SCRIPTS["sample_pipeline"]


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    from qdiff.cli.options.mixed_precision import add_mixed_precision_options
    from qdiff.cli.options.ptq import add_ptq_options

    parser = Parser(__doc__)
    parser.add_argument("--out", required=True, help="folder for the quantized pipeline; missing or empty")
    parser.add_argument("--max_shard_size", default="10GB", help="most bytes in one file of weights, e.g. 500MB")
    SCRIPT.add_options(parser)
    add_ptq_options(parser, SCRIPT.resume)
    add_mixed_precision_options(parser)
    add_run_options(parser, SCRIPT.folder)
    args = parser.parse_args(arguments)
    from qdiff.cli.quantize_pipeline import QuantizePipelineCommand

    command = QuantizePipelineCommand("quantize_pipeline", SCRIPT.pipeline_of(args), args)
    with command.notes_told():
        if args.dry_run:
            print(json.dumps(command.config, indent=1))
        else:
            command.run()


if __name__ == "__main__":
    main()
