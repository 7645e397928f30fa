"""Sample an unconditional latent diffusion model: in float, or quantized with --ptq.

    python scripts/sample_diffusion_ldm.py -r models/ldm/digits_vq -n 64 --batch_size 32 -c 20 -e 0.0 --seed 41 \\
        --ptq --weight_bit 4 --quant_act --act_bit 8 --a_sym --cali_st 20 --cali_n 32 --cali_iters 500 \\
        --cali_iters_a 200 -l runs/ldm-w4a8

Repeating a command continues its run folder.
"""

from __future__ import annotations

import json

from ldm.options import add_unconditional_options
from qdiff.cli.errors import exits_cleanly
from qdiff.cli.parser import Parser, add_calibration_options, add_quantization_options, add_run_options


def parse_args(arguments: list[str] | None = None):
    parser = Parser(__doc__)
    add_unconditional_options(parser)
    add_quantization_options(parser)
    add_calibration_options(parser)
    add_run_options(parser)
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    from ldm.command import UnconditionalModel
    from qdiff.cli.command import SampleCommand

    command = SampleCommand("sample_diffusion_ldm", UnconditionalModel(args))
    if args.dry_run:
        print(json.dumps(command.config, indent=1))
        return
    command.run()


if __name__ == "__main__":
    main()
