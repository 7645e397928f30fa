"""Sample a DDIM model: in float, or quantized with --ptq (calibrating first, or from a checkpoint).

    python scripts/sample_diffusion_ddim.py --config configs/digits.yml --use_pretrained --timesteps 50 \\
        --max_images 64 --ptq --weight_bit 4 --quant_act --act_bit 8 --split --cali_st 20 --cali_n 32 \\
        --cali_iters 500 --cali_iters_a 200 -l runs/w4a8

Repeating a command continues its run folder.
"""

from __future__ import annotations

import json

from ddim.options import add_options
from qdiff.cli.errors import exits_cleanly
from qdiff.cli.parser import Parser, add_calibration_options, add_quantization_options, add_run_options


def parse_args(arguments: list[str] | None = None):
    parser = Parser(__doc__)
    add_options(parser)
    parser.add_argument("--sequence", action="store_true", help="write x_0 predicted at every step of 8 images")
    parser.add_argument("--max_images", type=int, default=50000)
    add_quantization_options(parser)
    add_calibration_options(parser)
    add_run_options(parser)
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    from ddim.command import DdimModel
    from qdiff.cli.command import SampleCommand

    command = SampleCommand("sample_diffusion_ddim", DdimModel(args))
    if args.dry_run:
        print(json.dumps(command.config, indent=1))
        return
    command.run()


if __name__ == "__main__":
    main()
