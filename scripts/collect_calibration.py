"""Record a calibration set: sample the float DDIM model and keep what its network was fed, in the published format.

    python scripts/collect_calibration.py --config configs/digits.yml --use_pretrained --timesteps 50 \\
        --cali_st 20 --cali_n 32 --out calibration/digits.pt
"""

from __future__ import annotations

from ddim.options import add_model_options, add_sampler_options
from qdiff.cli.errors import exits_cleanly
from qdiff.cli.parser import Parser


def parse_args(arguments: list[str] | None = None):
    parser = Parser(__doc__)
    add_model_options(parser)
    add_sampler_options(parser)
    parser.add_argument("--cali_st", type=int, default=20, help="how many evenly spaced steps to record")
    parser.add_argument("--cali_n", type=int, default=256, help="samples a step")
    parser.add_argument("--batch_size", type=int, help="images sampled at a time")
    parser.add_argument("--device", help="e.g. cpu, cuda:0; default: CUDA where there is one")
    parser.add_argument("--out", required=True, help="the file to write (.pt)")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    from ddim.command import DdimModel
    from qdiff.calibration.samples import save_recording
    from qdiff.calibration.schedules import evenly_spaced
    from qdiff.cli.runtime import choose_device
    from qdiff.errors import UserError
    from qdiff.files import check_writable

    model = DdimModel(args)
    evenly_spaced(model.calls, args.cali_st)  # checks --cali_st
    if args.cali_n < 1:
        raise UserError(f"--cali_n is {args.cali_n}; give at least 1")
    check_writable(args.out)
    model.load(choose_device(args.device))
    save_recording(model.record(args.cali_st, args.cali_n), args.out)
    print(f"{args.out}: {args.cali_st} steps of {args.cali_n} samples")


if __name__ == "__main__":
    main()
