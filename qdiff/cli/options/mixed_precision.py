"""The options of mixed precision: a mean width, and how the widths of layers are chosen for it."""

from __future__ import annotations

import argparse
import dataclasses
import os
from argparse import Namespace

from qdiff.calibration.mixed_precision import TRAJECTORIES, MixedPrecision
from qdiff.calibration.sensitivity import Measure
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.methods.registry import Method

OPTIONS = (
    "target_bits",
    "target_act_bits",
    "candidate_bits",
    "candidate_act_bits",
    "sensitivity",
    "sensitivity_samples",
    "sensitivities",
)
_OF_OWN_CHOICE = "sensitivity_samples", "sensitivities"  # these change it
QUANTIZING = (*OPTIONS, "uniform_widths")
"""What has no effect on a float model."""
# By default: samples of one projection each; images of each sensitivity.
_USUAL = {Measure.SQNR: MixedPrecision.samples, Measure.PROBE: 128, Measure.TRAJECTORY: TRAJECTORIES, Measure.SSIM: 4}


def add_mixed_precision_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that calibrate."""
    default = {f.name: f.default for f in dataclasses.fields(MixedPrecision)}
    group = parser.add_argument_group("mixed precision")
    group.add_argument(
        "--target_bits", type=float, help="mean width of weights; widths of layers are chosen for the least error of ε"
    )
    group.add_argument("--candidate_bits", help=f"widths to choose from (default: {_words(default['candidates'])})")
    group.add_argument(
        "--target_act_bits",
        type=float,
        help="likewise for inputs of layers, as the mean over MACs; with both, widths of weights and inputs are chosen "
        "together, within the size and the bit operations of uniform widths",
    )
    group.add_argument(
        "--candidate_act_bits", help=f"widths to choose from (default: {_words(default['act_candidates'])})"
    )
    group.add_argument(
        "--sensitivity",
        choices=[m.value for m in Measure],
        help="what shows how sensitive a layer is: noise of ε, measured layer by layer (sqnr, default) or estimated "
        "for all layers in one backward pass (probe); noise of the sampler's result, estimated by a backward pass "
        "through all steps (trajectory); or images (ssim), far slower",
    )
    group.add_argument(
        "--sensitivity_samples",
        type=int,
        help="calibration samples to measure it on, or images with ssim (default: "
        + ", ".join(f"{number} with {measure.value}" for measure, number in _USUAL.items())
        + ")",
    )
    group.add_argument(
        "--sensitivities",
        help="sensitivities.json of another run on the same calibration set, instead of measuring again",
    )
    group.add_argument(
        "--uniform_widths",
        action="store_true",
        help="all layers have the widths that are asked for, where the method would choose them itself (GRIP)",
    )


def _words(widths: tuple[int, ...]) -> str:
    return ",".join(map(str, widths))


def chooses_by_itself(args: Namespace, method: Method, samples: bool) -> bool:
    """Return whether a method's own choice of widths applies: nothing else is said of them, and they can be chosen.

    Args:
        samples: whether the command has a sampler, whose result can tell widths.

    Raises:
        UserError: ``--uniform_widths`` is given, but the method does not choose.
    """
    uniform = getattr(args, "uniform_widths", False)
    if uniform and not method.chooses_widths:
        raise UserError(
            f"--uniform_widths has no meaning with {method.title}, which chooses no widths; leave it out, or give "
            "--method grip"
        )
    others = [name for name in (*OPTIONS, "layer_bits", "cali_ckpt") if name not in _OF_OWN_CHOICE]
    given = any(getattr(args, name, None) is not None for name in others)
    cached_in_float = getattr(args, "cache_temporal", None) == "float"  # these layers then have a width
    return method.chooses_widths and samples and not (uniform or given or cached_in_float)


def resolve_mixed_precision(
    args: Namespace, quant: QuantConfig, action: str, by_itself: bool = False
) -> MixedPrecision | None:
    """Return how widths are chosen; None if they are not.

    Args:
        args: a command's options; commands that do not calibrate lack these.
        action: see `qdiff.cli.options.ptq.PtqPlan`.
        by_itself: `chooses_by_itself`.

    Raises:
        UserError: options contradict each other or are out of range.
    """
    given = {name: value for name in OPTIONS if (value := getattr(args, name, None)) is not None}
    if "sensitivities" in given:
        _check_file(given["sensitivities"])
    if by_itself:
        own = TRAJECTORIES if args.sensitivity_samples is None else args.sensitivity_samples
        return MixedPrecision.around(quant, own)
    if not given:
        return None
    if "target_bits" not in given and "target_act_bits" not in given:
        raise UserError(f"--{next(iter(given))} needs a mean width; add --target_bits or --target_act_bits")
    for kind in ("", "act_"):
        if f"candidate_{kind}bits" in given and f"target_{kind}bits" not in given:
            raise UserError(
                f"--candidate_{kind}bits needs --target_{kind}bits; add it, or leave --candidate_{kind}bits out"
            )
    target = "target_bits" if "target_bits" in given else "target_act_bits"
    if action != "calibrate":
        raise UserError(
            f"--{target} chooses widths before a calibration, but --cali_ckpt names a calibrated file, which has its "
            "widths; leave out the options of mixed precision"
        )
    if "target_act_bits" in given and quant.act_bits is None:
        raise UserError("--target_act_bits needs quantized activations; add --quant_act")
    if "target_act_bits" in given and quant.modulate:
        raise UserError("--target_act_bits measures activations, not their changes; leave out --modulate")
    measure = given.get("sensitivity", Measure.SQNR.value)
    return MixedPrecision(
        target=given.get("target_bits"),
        candidates=_widths("candidate_bits", given, MixedPrecision.candidates),
        act_target=given.get("target_act_bits"),
        act_candidates=_widths("candidate_act_bits", given, MixedPrecision.act_candidates),
        measure=measure,
        samples=given.get("sensitivity_samples", _USUAL[Measure(measure)]),
    )


def _check_file(path: str) -> None:
    if not os.path.isfile(path):
        raise UserError(f"--sensitivities {path} does not exist; give the sensitivities.json of another run")


def _widths(option: str, given: dict[str, str], otherwise: tuple[int, ...]) -> tuple[int, ...]:
    if option not in given:
        return otherwise
    words = given[option].split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--{option} is {given[option]}; give whole numbers separated by commas")
    return tuple(sorted(int(word) for word in words))
