"""Record a calibration set: sample a float model and save the inputs of its network in the published format.

    python scripts/collect_calibration.py --config configs/digits.yml --use_pretrained --timesteps 50 \\
        --cali_st 20 --cali_n 32 --out calibration/digits.pt
    python scripts/collect_calibration.py --like sample_diffusion_ldm -r models/ldm/digits_vq -c 50 -e 0.0 --seed 41 \\
        --cali_st 20 --cali_n 32 --out calibration/digits_vq.pt

--like names the sampling script whose model and sampler options follow.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import sys

from families import SCRIPTS

from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.modiff import add_generate_option
from qdiff.cli.options.spacing import add_spacing_option, resolve_spacing
from qdiff.cli.out_of_memory import memory_advice, smaller_batch
from qdiff.cli.script import parser_like


def parse_args(arguments: list[str]) -> argparse.Namespace:
    parser = parser_like(__doc__, arguments, SCRIPTS)
    parser.add_argument("--cali_st", type=int, default=20, help="number of steps to record")
    add_spacing_option(parser)
    parser.add_argument("--cali_n", type=int, default=256, help="samples per step")
    parser.add_argument("--batch_size", type=int, help="images per batch")
    parser.add_argument("--device", help="e.g. cpu, cuda:0 (default: CUDA if available)")
    parser.add_argument("--cond", action="store_true", help="accepted; the config says whether a model is conditional")
    parser.add_argument("--out", required=True, help="the file to write (.pt)")
    add_generate_option(parser, default="raw")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    from qdiff.calibration.collect import record_evenly, recorded_calls
    from qdiff.calibration.samples import save_recording
    from qdiff.cli.processes import choose_device
    from qdiff.errors import require_at_least
    from qdiff.io.files import check_writable

    pipeline = SCRIPTS[args.like].pipeline_of(args)
    pairs = args.generate == "residual"
    recorded_calls(pipeline, args.cali_st, pairs)  # refuses more steps than there are
    require_at_least(1, {"--cali_n": args.cali_n})
    check_writable(args.out)
    with memory_advice("recording", smaller_batch(min(pipeline.batch_size, args.cali_n), to_continue=False)):
        pipeline.load(choose_device(args.device))
        for note in pipeline.notes:
            print(note, file=sys.stderr)
        recording = record_evenly(pipeline, args.cali_st, args.cali_n, pairs=pairs, spacing=resolve_spacing(args))
    save_recording(recording, args.out)
    print(f"{args.out}: {args.cali_st} steps with {args.cali_n} samples each")


if __name__ == "__main__":
    main()
