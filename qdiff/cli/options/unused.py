"""Options that a plan does not use: refused beside a calibrated file, and numbers if they are out of range."""

from __future__ import annotations

from argparse import Namespace

from qdiff.cli.options import scaling
from qdiff.errors import UserError
from qdiff.methods.registry import METHODS, Method

# What is decided when weights are calibrated. The papers' own options are not here: their commands repeat them.
_OF_WEIGHTS = (
    "weight_start",
    "gptq_target",
    "gptq_factor",
    "gptq_damping",
    "tfmq_every",
    "uniform_widths",
    "refit",
    *scaling.QUANTIZING,
)
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
        UserError: an option belongs to what the checkpoint holds already, or a number that the method does not have is
            out of the range of those that have it.
    """
    for option in _WITHOUT_EFFECT[action]:
        value = getattr(args, option, None)
        if value is not None and value is not False and not (option == "refit" and value == 0):
            raise UserError(
                f"--{option} belongs to calibrating, and --cali_ckpt names what is calibrated already; leave one of "
                "them out"
            )
    for other in METHODS.values():
        numbers = {
            field: value
            for option, field in other.options.items()
            if option not in method.options and _is_number(value := getattr(args, option, None))
        }
        if numbers:
            other.config(**numbers)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
