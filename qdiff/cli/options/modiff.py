"""The options of MoDiff's scripts, and what they mean."""

from __future__ import annotations

import argparse
from argparse import Namespace

from qdiff.config import Ablation, QuantConfig, ScalePer
from qdiff.errors import UserError
from qdiff.methods.modiff import ChangesConfig

RECORDINGS = ("raw", "residual")
# Options that have no effect on a float network; --modulate is refused there.
QUANTIZING = ("act_tensor", "act_scale_per", "rest_abit", "cali_min_max", "modulate_ablation")


def add_modiff_options(parser: argparse.ArgumentParser) -> None:
    """MoDiff's options, named as in its scripts."""
    group = parser.add_argument_group("MoDiff")
    group.add_argument(
        "--modulate",
        action="store_true",
        help="quantize the change of each layer's input since the previous sampling step",
    )
    group.add_argument("--act_tensor", action="store_true", help="with --quant_mode dynamic: one range per sample")
    group.add_argument(
        "--act_scale_per",
        choices=[s.value for s in ScalePer],
        help="with --quant_mode dynamic: granularity of ranges (default: tensor, the whole batch)",
    )
    group.add_argument(
        "--rest_abit",
        type=int,
        help="width of activations in the first step and of attention operands (default: float, as published)",
    )
    group.add_argument(
        "--cali_min_max", action="store_true", help="use the extremes of changes as their ranges, without learning"
    )
    group.add_argument(
        "--out_penalty",
        type=float,
        default=0.0,
        help="weight of the penalty on outputs beyond their range while ranges are learned",
    )
    group.add_argument(
        "--modulate_ablation",
        choices=[a.value for a in Ablation],
        help="leave out a part of modulation, for comparison",
    )
    add_generate_option(group)


def add_generate_option(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """The option that says what a recording holds."""
    text = "residual: with the step before each recorded step"
    if default is None:
        text = f"record the float model's calibration set in --cali_data_path and stop; {text}"
    parser.add_argument("--generate", choices=RECORDINGS, default=default, help=text)


def modulates(args: Namespace) -> bool:
    """Whether a command's options select modulation."""
    return args.modulate or args.method == "modiff"


def scale_per(args: Namespace) -> ScalePer:
    """Return the granularity of dynamic ranges: what shares one range."""
    if args.act_tensor and args.act_scale_per not in (None, ScalePer.SAMPLE.value):
        raise UserError(
            f"--act_tensor (one range per sample) and --act_scale_per {args.act_scale_per} contradict each other; "
            "leave one of them out"
        )
    return ScalePer(args.act_scale_per or (ScalePer.SAMPLE if args.act_tensor else ScalePer.TENSOR))


def resolve_changes(args: Namespace, quant: QuantConfig, learns: bool) -> ChangesConfig | None:
    """Return how ranges of changes are calibrated, or None if they are not.

    Args:
        learns: whether the method learns step sizes.
    """
    if not quant.calibrates_changes:
        for option in ("cali_min_max", "out_penalty"):
            if getattr(args, option):
                raise UserError(
                    f"--{option} needs calibrated ranges of changes (--modulate without --quant_mode dynamic); leave "
                    "it out"
                )
        return None
    learns = learns and not args.cali_min_max
    if args.out_penalty and not learns:
        raise UserError(
            "--out_penalty needs learned ranges; leave out --out_penalty, or --cali_min_max (--quant_mode linear)"
        )
    return ChangesConfig(
        learn=learns,
        iterations=args.cali_iters_a,
        batch_size=ChangesConfig.batch_size if args.cali_batch_size is None else args.cali_batch_size,
        lr=args.cali_lr,
        p=args.cali_p,
        out_penalty=args.out_penalty,
    )
