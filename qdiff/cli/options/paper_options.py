"""Options of the papers' scripts that are refused, with the reasons: no table of a paper uses them.

docs/options-of-the-papers.md has the same table, and lists the options that are accepted without effect.
"""

from __future__ import annotations

from argparse import Namespace

from qdiff.errors import UserError

_IMAGES = "is not described or used in any paper; give greedy (EDA-DM's), noise_backward_t (PTQ4DM's) or Q_diffusion"
_TIMESTEPS = "is not described or used in any paper; give normal (PTQ4DM's) or uniform"
# option → value → the end of the error, after the option and value; a flag has the value True
REFUSED: dict[str, dict[object, str]] = {
    "calib_im_mode": dict.fromkeys(("random", "raw", "raw_forward_t"), _IMAGES),
    "calib_t_mode": dict.fromkeys(("random", "1", "-1", "mean", "manual", "poisson"), _TIMESTEPS),
    "quant_mode": {
        "symmetric": "is the published default but not among the published choices; give qdiff, or linear",
        "squant": "is not described or used in any of these papers; give qdiff, or linear",
    },
    "laion400m": {True: "is not supported (that model's text encoder is a BERT); leave it out"},
}


def refused_values(option: str) -> list[str]:
    """Return the values of an option that the parser accepts and `check_paper_options` refuses."""
    return [str(value) for value in REFUSED[option]]


def check_paper_options(args: Namespace) -> None:
    """Raise a `UserError` with the reason if a refused option or value is given."""
    for option, reasons in REFUSED.items():
        value = getattr(args, option, None)
        if value in reasons:
            shown = "" if value is True else f" {value}"
            raise UserError(f"--{option}{shown} {reasons[value]}")
