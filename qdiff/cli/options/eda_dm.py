"""The options of EDA-DM's scripts, and what they mean."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from qdiff.calibration.timesteps import Draw, Schedule
from qdiff.cli.options.paper_options import refused_values
from qdiff.errors import UserError
from qdiff.methods.registry import METHODS, Method

# The published scripts' names for ways to choose timesteps; their other choices are not in the paper.
IMAGE_MODES = {"greedy": Schedule.TDAC, "Q_diffusion": Schedule.UNIFORM}
TIMESTEP_MODES = {"normal": Schedule.NORMAL, "uniform": Schedule.UNIFORM, "Qdiff": Schedule.UNIFORM}
BY_TIMESTEPS = "noise_backward_t"

_DRAW = {
    "calib_num_samples": "count",
    "batch_samples": "batch_size",
    "lamda": "lamda",
    "tdac_radius": "radius",
}
_PRESET = (
    METHODS["eda-dm"].options.keys() - {"recon_unit", "weight_start", "bias_correction", "temporal_unit"} | _DRAW.keys()
)
# The section of a preset whose values the papers use only for 8-bit weights.
WIDE, WIDE_BITS = "w8", 8
_WHOLE = ("calib_num_samples", "batch_samples", "cali_iters", "cali_batch_size")
# Without --method, any of these options selects EDA-DM.
IMPLYING = (
    *("calib_im_mode", "calib_t_mode", "calib_num_samples", "batch_samples", "lamda", "tdac_radius"),
    *("recon", "block_recon", "layer_recon", "add_loss", "lr_w", "lr_a", "qdrop"),
)


def add_eda_dm_options(parser: argparse.ArgumentParser) -> None:
    """EDA-DM's options, named as in its scripts.

    Defaults come from the model config's ``eda_dm`` section, then from the script's preset.
    """
    group = parser.add_argument_group("EDA-DM (any of these selects --method eda-dm)")
    group.add_argument(
        "--calib_im_mode",
        choices=[*IMAGE_MODES, BY_TIMESTEPS, *refused_values("calib_im_mode")],
        metavar=_choices(*IMAGE_MODES, BY_TIMESTEPS),
        help="greedy: TDAC (default); noise_backward_t: chosen by --calib_t_mode; Q_diffusion: uniform",
    )
    group.add_argument(
        "--calib_t_mode",
        choices=[*TIMESTEP_MODES, *refused_values("calib_t_mode")],
        metavar=_choices(*TIMESTEP_MODES),
        help="normal: PTQ4DM's distribution; ignored with greedy",
    )
    group.add_argument("--calib_num_samples", type=int, help="calibration images, one sample each")
    group.add_argument("--batch_samples", type=int, help="batch size of sampling the calibration images")
    group.add_argument("--lamda", type=float, help="λ of TDAC: weight of variety against density")
    group.add_argument("--tdac_radius", type=float, help="r of TDAC: distance within which features count as near")
    group.add_argument(
        "--recon", action=argparse.BooleanOptionalAction, help="reconstruct (default), or set only the ranges"
    )
    group.add_argument("--block_recon", action="store_true", default=None, help="fit blocks (default)")
    group.add_argument("--layer_recon", action="store_true", default=None, help="fit layers one by one")
    group.add_argument("--add_loss", type=float, help="γ of FBR: weight of the layers' own errors; 0 is off")
    group.add_argument("--lr_w", type=float, help="learning rate of rounding")
    group.add_argument("--lr_a", type=float, help="learning rate of activation step sizes")
    group.add_argument(
        "--qdrop", type=float, help="probability of staying in float while fitting (default 0.5); 0 is off"
    )
    group.add_argument(
        "--class_cond",
        action="store_true",
        help="accepted without effect: the config says whether a model is conditional",
    )
    group.add_argument(
        "--change_block_recon",
        action="store_true",
        help="accepted without effect: blocks are always fitted in execution order",
    )


def _choices(*values: str) -> str:
    return "{" + ",".join(values) + "}"


def of_width(preset: dict[str, Any], weight_bits: int) -> dict[str, Any]:
    """Return a preset's values for a weight width; for 8 bits, its section ``w8`` overrides the others."""
    wide = preset.get(WIDE) or {}
    if not isinstance(wide, Mapping):
        raise UserError(f"the preset of EDA-DM has {WIDE}: {wide!r}; make it values by option name in the YAML file")
    rest = {option: value for option, value in preset.items() if option != WIDE}
    return {**rest, **wide} if weight_bits == WIDE_BITS else rest


def implied_by(args: Namespace) -> list[str]:
    """Return the given options that select EDA-DM."""
    return [name for name in IMPLYING if getattr(args, name, None) is not None]


def resolve_draw(args: Namespace, method: Method, preset: dict[str, Any]) -> Draw:
    """Return how the calibration samples are drawn.

    Args:
        method: a method that draws its samples.
        preset: values by option name, for options that were not given.
    """
    values = _given(args, preset, _DRAW)
    mode = args.calib_im_mode or ("greedy" if method.draws is Schedule.TDAC else BY_TIMESTEPS)
    if method.draws is not Schedule.TDAC and mode == "greedy":
        raise UserError(f"--method {method.name} contradicts --calib_im_mode greedy; leave one of them out")
    # The published commands combine --calib_t_mode normal with greedy, which ignores it.
    schedule = IMAGE_MODES[mode] if mode in IMAGE_MODES else TIMESTEP_MODES[args.calib_t_mode or "normal"]
    return Draw(schedule=schedule, **values)


def resolve_recipe(args: Namespace, method: Method, preset: dict[str, Any]) -> Any:
    """Return the method's settings as its config class; arguments as in `resolve_draw`."""
    if args.block_recon and args.layer_recon:
        raise UserError("--block_recon and --layer_recon contradict each other; leave one of them out")
    if args.block_recon and args.recon_unit == "layer":
        raise UserError("--block_recon and --recon_unit layer contradict each other; leave one of them out")
    if args.add_loss and "add_loss" not in method.options:
        raise UserError(f"--method {method.name} contradicts --add_loss, which is EDA-DM's; leave one of them out")
    values = _given(args, preset, {o: f for o, f in method.options.items() if o != "recon_unit"})
    unit = "layer" if args.layer_recon or args.recon_unit == "layer" else "block"
    return method.config(unit=unit, **values)


def _given(args: Namespace, preset: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the given values, else the preset's, under the names of the dataclass."""
    unknown = sorted(set(preset) - _PRESET)
    if unknown:
        raise UserError(f"the preset of EDA-DM has {unknown[0]!r}, which is not an option; correct the YAML file")
    for option, value in preset.items():
        kind = bool if option == "recon" else int if option in _WHOLE else (int, float)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            wanted = "true or false" if kind is bool else "a whole number" if kind is int else "a number"
            raise UserError(f"the preset of EDA-DM has {option}: {value!r}; make it {wanted} in the YAML file")
    chosen = {option: getattr(args, option, None) for option in names}
    return {
        names[option]: preset[option] if value is None else value
        for option, value in chosen.items()
        if value is not None or option in preset
    }
