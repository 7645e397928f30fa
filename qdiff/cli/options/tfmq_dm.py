"""The options of TFMQ-DM: the temporal unit, which other methods take too, and the method's own."""

from __future__ import annotations

import argparse
from argparse import Namespace

from qdiff.config import ActRanges
from qdiff.errors import UserError
from qdiff.methods.registry import Method

OPTIONS = ("temporal_unit", "tfmq_every")  # they have no effect on a float network


def add_tfmq_dm_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``--method tfmq-dm``, and those with which other methods use a part of it."""
    group = parser.add_argument_group("TFMQ-DM")
    group.add_argument(
        "--temporal_unit",
        action=argparse.BooleanOptionalAction,
        help="fit what depends on the timestep alone (the time embedding and its projections in all blocks) first, as "
        "one unit (default: with tfmq-dm)",
    )
    group.add_argument(
        "--tfmq_every",
        type=int,
        help="fit weights on the samples of every k-th of the --cali_st timesteps (default: 1); ranges come from all",
    )


def check_tfmq_dm_options(args: Namespace, method: Method) -> None:
    """Raise a `UserError` for a given option that the method does not have."""
    for option in OPTIONS:
        if getattr(args, option, None) not in (None, False) and option not in method.options:
            raise UserError(
                f"--{option} has no meaning with --method {method.name}; leave --{option} out, or choose another "
                "--method"
            )


def act_ranges(args: Namespace, method: Method, dynamic: bool) -> ActRanges:
    """Return what shares one calibrated range: as asked for, else as the method does it where ranges are calibrated.

    Args:
        dynamic: ranges are dynamic, or those of changes.
    """
    if args.act_ranges is not None:
        return ActRanges(args.act_ranges)
    calibrated = args.quant_act and not dynamic
    return method.quant.get("act_ranges", ActRanges.SHARED) if calibrated else ActRanges.SHARED
