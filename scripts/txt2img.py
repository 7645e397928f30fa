"""Sample a text-conditional latent diffusion model: in float, or quantized with --ptq.

    python scripts/txt2img.py --prompt "a handwritten three" --plms --n_samples 5 --cond --ptq --weight_bit 4 \\
        --quant_mode qdiff --no_grad_ckpt --split --quant_act --act_bit 8 --sm_abit 16 --cali_st 25 --cali_n 16 \\
        --cali_iters 500 --cali_iters_a 200 --outdir runs/txt2img-w4a8

takes Stable Diffusion v1 where its checkpoint is in place, else the bundled digits model. Repeating a command
continues its run folder.
"""

from __future__ import annotations

import json

from ldm.options import add_text_options
from qdiff.cli.errors import exits_cleanly
from qdiff.cli.parser import Parser, add_calibration_options, add_quantization_options, add_run_options


def parse_args(arguments: list[str] | None = None):
    parser = Parser(__doc__)
    add_text_options(parser)
    add_quantization_options(parser)
    add_calibration_options(parser)
    add_run_options(parser, folder=("--outdir", "-l", "--logdir"))
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    from ldm.command import TextModel
    from qdiff.cli.command import SampleCommand

    command = SampleCommand("txt2img", TextModel(args))
    if args.dry_run:
        print(json.dumps(command.config, indent=1))
        return
    command.run()


if __name__ == "__main__":
    main()
