"""Sample a DDIM model: in float, or quantized with --ptq (calibrating first, or from a checkpoint).

    python scripts/sample_diffusion_ddim.py --config configs/digits.yml --use_pretrained --timesteps 50 \\
        --max_images 64 --ptq --weight_bit 4 --quant_act --act_bit 8 --split --cali_st 20 --cali_n 32 \\
        --cali_iters 500 --cali_iters_a 200 -l runs/w4a8

Repeating a command continues its run folder.
"""

from __future__ import annotations

import json

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.parser import Parser, add_calibration_options, add_quantization_options, add_run_options


def parse_args(arguments: list[str] | None = None):
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, help="model config, e.g. configs/cifar10.yml")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--use_pretrained", action="store_true", help="the config's released or bundled weights")
    parser.add_argument("--ckpt", help="float weights from a file instead")
    parser.add_argument(
        "--sample_type", choices=["generalized", "ddpm_noisy", "dpm_solver"], default="generalized"
    )
    parser.add_argument("--skip_type", choices=["uniform", "quad"], default="uniform")
    parser.add_argument("--timesteps", type=int, default=1000)
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--dpm_order", type=int, choices=[1, 2, 3], default=2)
    parser.add_argument("--dpm_method", choices=["multistep", "singlestep"], default="multistep")
    parser.add_argument("--sequence", action="store_true", help="write x_0 predicted at every step of 8 images")
    parser.add_argument("--max_images", type=int, default=50000)
    add_quantization_options(parser)
    add_calibration_options(parser)
    add_run_options(parser)
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    from ddim.command import DdimCommand

    command = DdimCommand(args)
    if args.dry_run:
        print(json.dumps(command.config, indent=1))
        return
    command.run()


if __name__ == "__main__":
    main()
