"""The options of input scales, which every method may start from, and of finer step sizes of single channels."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import replace

from qdiff.calibration.input_scales import InputScaling, Scaling
from qdiff.checkpoint.metadata import config_if_native
from qdiff.errors import UserError
from qdiff.methods.registry import Method

OF_LEARNING = {"scaling_start": "start", "scaling_iters": "iterations", "scaling_weighting": "weighting"}
# Options that have no effect on a float network.
QUANTIZING = ("scaling", *OF_LEARNING)


def add_scaling_options(parser: argparse.ArgumentParser) -> None:
    """``--scaling`` and the options of learning."""
    group = parser.add_argument_group("input scales")
    kinds = [kind.value for kind in Scaling]
    group.add_argument(
        "--scaling",
        choices=kinds,
        help="move range from inputs to weights, channel by channel, before anything is quantized: in closed form "
        "(dilate: DilateQuant's), by a search over powers of the largest values, or learned (DMQ's) "
        "(default: none; with --method dmq: learned)",
    )
    group.add_argument("--scaling_iters", type=int, help="iterations per layer of learning (default: 6000)")
    group.add_argument(
        "--scaling_weighting",
        type=float,
        metavar="R",
        help="exponent by which timesteps with a large share of the loss count less in learning (default: 20; 0: none)",
    )
    group.add_argument(
        "--scaling_start",
        choices=[kind for kind in kinds if kind != Scaling.LEARNED.value],
        help="where learning starts (default: none, all factors 1)",
    )


def power_of_two_scales(args: Namespace, method: Method, dynamic: bool) -> bool:
    """Return whether channels may have finer step sizes: as asked for, else as in the file whose ranges are loaded.

    Without such a file, the method decides where it calibrates ranges.

    Args:
        dynamic: ranges are dynamic, or those of changes.
    """
    if args.power_of_two_scales is not None:
        return args.power_of_two_scales
    if not args.quant_act or dynamic:
        return False
    own = method.quant.get("power_of_two_scales", False)
    there = None if args.resume_w else config_if_native(args.cali_ckpt)
    return own if there is None else there.power_of_two_scales


def resolve_scaling(args: Namespace, method: Method, action: str) -> InputScaling:
    """Return how inputs are scaled; without an option, as the method does.

    Args:
        action: of the plan; scales are part of calibrating weights.

    Raises:
        UserError: options contradict each other, or are out of range.
    """
    if action != "calibrate":
        return InputScaling()
    given = {name: value for name in QUANTIZING if (value := getattr(args, name, None)) is not None}
    made = method.scaling if args.scaling is None else replace(method.scaling, kind=args.scaling)
    learning = [name for name in given if name in OF_LEARNING]
    if learning and made.kind is not Scaling.LEARNED:
        raise UserError(f"--{learning[0]} needs --scaling learned; add it, or leave --{learning[0]} out")
    if made.kind is not Scaling.LEARNED:
        return InputScaling(made.kind)
    if args.cali_batch_size is not None:
        made = replace(made, batch_size=args.cali_batch_size)
    return replace(made, **{OF_LEARNING[name]: given[name] for name in learning})
