"""``--cali_spacing``: which of a sampling run's timesteps calibration takes."""

from __future__ import annotations

import argparse

from qdiff.calibration.timesteps import Spacing
from qdiff.errors import UserError
from qdiff.methods.registry import Method


def add_spacing_option(parser: argparse._ActionsContainer, exception: str | None = None) -> None:
    """Add the option, None by default.

    Args:
        exception: to the default that help gives.
    """
    default = ", ".join(filter(None, ("default: every", exception)))
    parser.add_argument(
        "--cali_spacing",
        choices=[spacing.value for spacing in Spacing],
        help="which timesteps --cali_st takes: every k-th from the noisiest on, where k is the number of steps divided "
        "by --cali_st and rounded down, as in the papers' code, where 20 of 25 steps are the first 20; "
        f"or spread from the first to the last, both ends included ({default})",
    )


def resolve_spacing(args: argparse.Namespace, method: Method | None = None) -> Spacing:
    """Return what the option says, or else the method's spacing.

    Args:
        method: None records for any method.

    Raises:
        UserError: the method draws its timesteps by a distribution, but the option is given.
    """
    if args.cali_spacing is None:
        return Spacing.EVERY if method is None else method.spacing
    if method is not None and method.draws is not None:
        raise UserError(
            f"--cali_spacing has no meaning with --method {method.name}, which draws its timesteps; leave it out"
        )
    return Spacing(args.cali_spacing)
