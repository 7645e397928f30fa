"""The options of rounding in closed form: GPTQ as a method, as the start of learned rounding, and bias correction."""

from __future__ import annotations

import argparse
from argparse import Namespace

from qdiff.calibration.column_rounding import Target
from qdiff.calibration.fitting import WeightStart
from qdiff.errors import UserError
from qdiff.methods.registry import Method

METHOD_OPTIONS = ("gptq_target", "gptq_factor", "gptq_damping", "gptq_rows")
# Options that have no effect on a float network.
QUANTIZING = (*METHOD_OPTIONS, "weight_start", "bias_correction")


def add_gptq_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``--method gptq``, and those with which the learned methods use a part of it."""
    group = parser.add_argument_group("GPTQ and bias correction")
    group.add_argument(
        "--gptq_target",
        choices=[t.value for t in Target],
        help="what the rounded weight reproduces: the float network's output (corrected, default), the same by GPTAQ's "
        "update, or its own output on the quantized input (plain GPTQ)",
    )
    group.add_argument("--gptq_factor", type=float, help="weight of the input's error (default: 1; gptaq: 0.25)")
    group.add_argument("--gptq_damping", type=float, help="share of the mean diagonal that is added (default: 0.01)")
    group.add_argument("--gptq_rows", type=int, help="most input rows per layer to use (default: 16384)")
    group.add_argument(
        "--weight_start",
        choices=[s.value for s in WeightStart],
        help="where learned rounding starts: at the float weights (nearest, default), or at integers by GPTQ, with the "
        "targets of --gptq_target: gptq (corrected), gptaq, or plain-gptq",
    )
    group.add_argument(
        "--bias_correction",
        action=argparse.BooleanOptionalAction,
        help="shift biases so that mean outputs are the float ones (default: with gptq)",
    )


def check_gptq_options(args: Namespace, method: Method) -> None:
    """Raise a `UserError` for a given option that the method does not have."""
    for option in QUANTIZING:
        if getattr(args, option, None) is not None and option not in method.options:
            instead = " (GPTQ rounds the weights itself)" if option == "weight_start" and method.name == "gptq" else ""
            raise UserError(
                f"--{option} has no meaning with --method {method.name}{instead}; leave --{option} out, or choose "
                "another --method"
            )
