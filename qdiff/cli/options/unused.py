"""Options whose values a plan does not use: refused beside a calibrated file, and if they are out of range."""

from __future__ import annotations

from argparse import Namespace

from qdiff.errors import UserError
from qdiff.methods.registry import METHODS, Method

# What is decided when weights are calibrated. The papers' own options are not here: their commands repeat them.
_OF_WEIGHTS = ("weight_start", "gptq_target", "gptq_factor", "gptq_damping", "tfmq_every", "uniform_widths", "refit")
_WITHOUT_EFFECT = {
    "calibrate": (),
    "activations": _OF_WEIGHTS,
    "load": (*_OF_WEIGHTS, "gptq_rows", "bias_correction", "temporal_unit", "cali_spacing"),
}


def check_unused(args: Namespace, method: Method, action: str) -> None:
    """Check the given options that a plan does not use.

    Args:
        args: a command's options; commands that do not calibrate lack some of these.
        action: of the plan.

    Raises:
        UserError: an option belongs to what the checkpoint holds already, or one that the method does not have is out
            of the range of those that have it.
    """
    for option in _WITHOUT_EFFECT[action]:
        if getattr(args, option, None):
            raise UserError(
                f"--{option} belongs to calibrating, and --cali_ckpt names what is calibrated already; leave one of "
                "them out"
            )
    for other in METHODS.values():
        numbers = {
            field: value
            for option, field in other.options.items()
            if option not in method.options and (value := getattr(args, option, None)) is not None
        }
        if numbers:
            other.config(**numbers)
