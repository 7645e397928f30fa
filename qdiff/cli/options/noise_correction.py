"""The options of noise correction at the sampler."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from qdiff.errors import UserError, require_at_least

SAMPLES = 64
_OF_COLLECTING = ("correction_samples", "correction_per")


@dataclass(frozen=True)
class CorrectionPlan:
    """Which noise correction a run uses.

    Attributes:
        kind, per: names in `qdiff.calibration.noise_regression`; None takes the file's.
        samples: images to collect it on; None with a ``path``.
        path: file of a correction that was collected before; None collects one in the run.
    """

    kind: str | None
    per: str | None
    samples: int | None
    path: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the images, for the run's configuration."""
        if self.path is not None:
            return {"path": self.path}
        return {"kind": self.kind, "per": self.per, "samples": self.samples}


def add_correction_options(parser: argparse.ArgumentParser) -> None:
    """Noise correction, for every script that samples."""
    from qdiff.calibration.noise_regression import Kind, Per  # loads torch

    group = parser.add_argument_group("noise correction")
    group.add_argument(
        "--noise_correction",
        choices=[kind.value for kind in Kind],
        help="subtract the predictable part of the error of ε at every step, and add as much less noise as its random "
        "part brings; d2: regression of the error on the quantized ε (D²-DPM), ptqd: on the float ε (PTQD)",
    )
    group.add_argument(
        "--correction_samples",
        type=int,
        help=f"calibration images to collect its statistics on (default: {SAMPLES}); the float network samples them, "
        "and both networks run at every step",
    )
    group.add_argument(
        "--correction_per",
        choices=[per.value for per in Per],
        help="one set of statistics for all channels (tensor, default) or for each channel; ptqd has a mean for each "
        "channel in either case",
    )
    group.add_argument(
        "--correction_path",
        help="use the noise_correction.json of another run with the same checkpoint, sampler, steps, eta and guidance",
    )


def resolve_correction(args: Namespace) -> CorrectionPlan | None:
    """Return the noise correction that options ask for; None if they ask for none.

    Raises:
        UserError: the options contradict each other or are out of range.
    """
    kind, path = args.noise_correction, args.correction_path
    named = [option for option in _OF_COLLECTING if getattr(args, option) is not None]
    if path is not None:
        if named:
            raise UserError(f"--{named[0]} is for collecting and contradicts --correction_path; leave one of them out")
        return CorrectionPlan(kind, None, None, path)
    if kind is None:
        if named:
            raise UserError(
                f"--{named[0]} has no meaning without --noise_correction; add it, or leave --{named[0]} out"
            )
        return None
    require_at_least(1, {"--correction_samples": args.correction_samples})
    return CorrectionPlan(kind, args.correction_per or "tensor", args.correction_samples or SAMPLES, None)
