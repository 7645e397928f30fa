"""Resolve the quantization options of a command into a plan."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from qdiff.calibration.input_scales import InputScaling, Scaling
from qdiff.calibration.mixed_precision import MixedPrecision
from qdiff.calibration.timesteps import Draw, Spacing
from qdiff.cli.options import eda_dm, gptq, mixed_precision, modiff, scaling, tfmq_dm, unused
from qdiff.cli.options.layer_bits import of_checkpoint, read_layer_bits
from qdiff.cli.options.parser import BITS, add_calibration_options, add_quantization_options
from qdiff.cli.options.spacing import resolve_spacing
from qdiff.config import LayerBits, QuantConfig
from qdiff.errors import UserError, require_at_least
from qdiff.methods.modiff import ChangesConfig
from qdiff.methods.registry import DEFAULT, METHODS, Method, Scripts, find_method
from qdiff.ranges.estimators import RangeMethod

# Fields of recipes that came later, and their defaults.
_LATER = {"start": "nearest", "bias_correction": False, "temporal_unit": False}
# Methods whose recipes always had some of them.
_FROM_THE_FIRST = {"gptq": ("bias_correction",), "tfmq-dm": tuple(_LATER), "grip": tuple(_LATER)}


@dataclass(frozen=True)
class PtqPlan:
    """How a run quantizes its network.

    Attributes:
        method: method for the weights, and for activations that are not modulated; a name of `qdiff.methods.registry`.
        quant: widths and ranges.
        action: ``calibrate`` everything, ``load`` a finished checkpoint, or load its weights and calibrate
            ``activations``.
        checkpoint: file to load, or None.
        data: calibration file; None records one.
        steps, per_step: ``--cali_st`` and ``--cali_n``.
        draw: EDA-DM's and PTQ4DM's calibration set, which replaces ``steps`` and ``per_step``; else None.
        recipe: the method's settings, an instance of its config class; None if it has none.
        memory_budget: GiB of RAM for activations; None has no limit.
        seed: seed of the calibration; None takes the run's.
        changes: how ranges of activation changes are calibrated (MoDiff); None if they are not.
        mixed: how widths of layers are chosen before calibrating (`qdiff.cli.mixed_precision`); None if they are not.
        scaling: how layers get their input scales.
        spacing: which timesteps are recorded, or taken from the file, where there are more.
        refit: how often the network is calibrated again, on its own trajectory (`qdiff.calibration.refit`).
    """

    method: str
    quant: QuantConfig
    action: Literal["calibrate", "load", "activations"]
    checkpoint: str | None
    data: str | None
    steps: int
    per_step: int
    recipe: Any
    memory_budget: float | None
    draw: Draw | None = None
    seed: int | None = None
    changes: ChangesConfig | None = None
    mixed: MixedPrecision | None = None
    scaling: InputScaling = field(default_factory=InputScaling)
    spacing: Spacing = Spacing.EVERY
    refit: int = 0

    @property
    def name(self) -> str:
        """Name of the method, modulation included."""
        if not self.quant.modulate:
            return self.method
        return "modiff" if self.method == DEFAULT else f"{self.method}+modiff"

    @property
    def samples(self) -> int:
        """Number of calibration samples that the plan asks for."""
        return self.steps * self.per_step if self.draw is None else self.draw.count

    @property
    def records(self) -> bool:
        """Whether a run samples calibration sets itself."""
        return self.action != "load" and (self.data is None or self.refit > 0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the manifest: everything that decides the result, so not the memory budget."""
        values = {**asdict(self), "quant": self.quant.to_dict()}
        del values["memory_budget"]
        # Entries that came later are left out at their defaults, so that runs from before can be continued.
        for name, default in (("changes", None), ("mixed", None), ("refit", 0), ("spacing", Spacing.EVERY)):
            if values[name] == default:
                del values[name]
        if self.scaling.kind is Scaling.NONE:
            del values["scaling"]
        for name, default in _LATER.items():
            recipe = values["recipe"] or {}
            if recipe.get(name, not default) == default and name not in _FROM_THE_FIRST.get(self.method, ()):
                del recipe[name]
        return values


def add_ptq_options(parser: argparse.ArgumentParser, resume: bool = True) -> None:
    """Every option that `resolve_ptq` reads, named as in the papers' scripts.

    Args:
        resume: see `add_calibration_options`.
    """
    add_quantization_options(parser)
    add_calibration_options(parser, resume)
    eda_dm.add_eda_dm_options(parser)
    modiff.add_modiff_options(parser)
    gptq.add_gptq_options(parser)
    tfmq_dm.add_tfmq_dm_options(parser)
    scaling.add_scaling_options(parser)


def ignored_options(args: Namespace) -> list[str]:
    """Return a sentence about given options that have no effect.

    The papers' scripts accept them silently, so a float run could be mistaken for a quantized one.
    """
    widths = {name: getattr(args, name) != BITS for name in ("weight_bit", "act_bit")}
    if args.ptq:
        unused = widths["act_bit"] and not args.quant_act
        return ["--act_bit has no effect without --quant_act: activations stay in float"] if unused else []
    flags = (
        "split",
        "a_sym",
        "w_sym",
        "w_range",
        "a_range",
        "act_ranges",
        "power_of_two_scales",
        "keep_ends",
        "layer_bits",
        "bos_aware",
        "fused_kernels",
        "refit",
        *modiff.QUANTIZING,
        *eda_dm.IMPLYING,
        *gptq.QUANTIZING,
        *tfmq_dm.OPTIONS,
        *mixed_precision.QUANTIZING,
        *scaling.QUANTIZING,
        *(() if args.generate else ("cali_spacing",)),
    )
    given = [name for name in (*widths, *flags) if widths.get(name, getattr(args, name, None))]
    named = ", ".join(f"--{name}" for name in given)
    return [f"without --ptq the float model samples, and {named} has no effect"] if given else []


def resolve_ptq(
    args: Namespace, weight_range: str, act_range: str, preset: dict[str, Any] | None = None, samples: bool = False
) -> PtqPlan | None:
    """Return the plan that the options in ``args`` ask for, or None without ``--ptq``.

    Args:
        weight_range, act_range: the script's defaults, for methods that do not choose ranges themselves.
        preset: EDA-DM's values by option name, for options that were not given.
        samples: whether the command has a sampler, whose result can tell widths.

    Raises:
        UserError: options that contradict each other (both are named) or are out of range.
    """
    if not args.ptq:
        options = ["quant_act", "resume", "resume_w", "cali_ckpt", "modulate", "method"]
        if args.generate is None:
            options.append("cali_data_path")
        for option in options:
            if getattr(args, option, None):
                raise UserError(f"--{option} has no meaning without --ptq; add --ptq, or leave --{option} out")
        return None
    if args.generate is not None:
        raise UserError("--generate records from the float model and contradicts --ptq; leave one of them out")
    method, modulate = find_method(_method(args)), modiff.modulates(args)
    gptq.check_gptq_options(args, method)
    tfmq_dm.check_tfmq_dm_options(args, method)
    eda_dm_scripts = method.scripts is Scripts.EDA_DM
    own = {"weight_range": weight_range, "act_range": act_range, **method.quant}
    chooses = mixed_precision.chooses_by_itself(args, method, samples)
    quant = QuantConfig(
        weight_bits=args.weight_bit,
        act_bits=args.act_bit if args.quant_act else None,
        # In EDA-DM's scripts the flag has the opposite meaning: without it, the search is symmetric.
        act_symmetric=args.a_sym != eda_dm_scripts,
        softmax_bits=args.sm_abit,
        split_shortcut=own.get("split_shortcut", False) if args.split is None else args.split,
        weight_symmetric=args.w_sym,
        weight_range=args.w_range or own["weight_range"],
        act_range=args.a_range or (RangeMethod.MIN_MAX if modulate else own["act_range"]),  # modulated: of changes
        keep_ends=own.get("keep_ends", False) if args.keep_ends is None else args.keep_ends,
        act_dynamic=args.quant_mode == "dynamic",
        act_scale_per=modiff.scale_per(args),
        modulate=modulate,
        rest_bits=args.rest_abit,
        ablation=args.modulate_ablation,
        act_ranges=tfmq_dm.act_ranges(args, method, modulate or args.quant_mode == "dynamic"),
        power_of_two_scales=scaling.power_of_two_scales(args, method, modulate or args.quant_mode == "dynamic"),
        layer_bits=_layer_bits(args, own.get("layer_bits", {})),
        bos_aware=args.bos_aware,
    )
    quant = method.to_choose_from(quant) if chooses else quant
    action = _action(args, method, quant)
    unused.check_unused(args, method, action)
    changes = modiff.resolve_changes(args, quant, learns=method.learns)
    recipe, draw = None, None
    if method.draws is not None and changes is not None and action == "calibrate":
        raise UserError(
            f"--method {method.name} draws single samples, but --modulate needs pairs of steps; calibrate its weights "
            "without --modulate first, then add --resume_w --cali_ckpt PATH (or give --quant_mode dynamic)"
        )
    if method.draws is not None and changes is None:
        draw = eda_dm.resolve_draw(args, method, preset or {})
    if method.learns and not (eda_dm_scripts and changes is not None):
        recipe = _recipe(args, method, preset or {})
    require_at_least(1, {"--cali_st": args.cali_st, "--cali_n": args.cali_n})
    require_at_least(0, {"--cali_seed": args.cali_seed, "--refit": args.refit})
    if args.memory_budget is not None and not 0 <= args.memory_budget < math.inf:
        raise UserError(f"--memory_budget is {args.memory_budget}; give 0 or more GiB")
    return PtqPlan(
        method=method.name,
        quant=quant,
        action=action,
        checkpoint=args.cali_ckpt,
        data=args.cali_data_path,
        steps=args.cali_st,
        per_step=args.cali_n,
        recipe=recipe,
        memory_budget=args.memory_budget,
        draw=draw,
        seed=args.cali_seed,
        changes=changes,
        mixed=mixed_precision.resolve_mixed_precision(args, quant, action, chooses),
        scaling=scaling.resolve_scaling(args, method, action),
        spacing=Spacing.EVERY if action == "load" else resolve_spacing(args, method),
        refit=args.refit,
    )


def _recipe(args: Namespace, method: Method, preset: dict[str, Any]) -> Any:
    """Return the method's settings from its options; options that were not given keep the config's defaults."""
    if method.scripts is Scripts.EDA_DM:
        return eda_dm.resolve_recipe(args, method, preset)
    given = {field: getattr(args, option) for option, field in method.options.items()}
    return method.config(**{field: value for field, value in given.items() if value is not None})


def _layer_bits(args: Namespace, own: Mapping[str, str]) -> dict[str, LayerBits]:
    """Return the widths of single layers: the given ones, or the calibrated file's, or the method's."""
    widths = read_layer_bits(args.layer_bits, own, args.quant_act)
    if args.layer_bits is not None:
        return widths
    return of_checkpoint(args.cali_ckpt, widths, args.quant_act, only_weights=args.resume_w)


def _method(args: Namespace) -> str:
    """Return the method that ``--method`` names, or that the other options imply."""
    implying = eda_dm.implied_by(args)
    linear = args.quant_mode == "linear"
    named = None if args.method == "modiff" else args.method  # modiff combines with any method
    if named is not None and named != "linear" and linear:
        raise UserError(f"--method {named} contradicts --quant_mode linear; leave one of them out")
    others = [name for name, method in METHODS.items() if method.scripts is not Scripts.EDA_DM]
    if implying and (named in others or (named is None and linear)):
        other = f"--method {named}" if named else "--quant_mode linear"
        raise UserError(f"--{implying[0]} is EDA-DM's and contradicts {other}; leave one of them out")
    return named or ("eda-dm" if implying else "linear" if linear else DEFAULT)


def _action(args: Namespace, method: Method, quant: QuantConfig) -> Literal["calibrate", "load", "activations"]:
    resume = getattr(args, "resume", None) is True  # in EDA-DM's LSUN scripts it names the float checkpoint
    if resume and args.resume_w:
        raise UserError("--resume and --resume_w contradict each other; leave one of them out")
    for option, given in (("resume", resume), ("resume_w", args.resume_w)):
        if given and not args.cali_ckpt:
            raise UserError(f"--{option} needs a checkpoint; add --cali_ckpt PATH")
    if args.resume_w:
        if not args.quant_act:
            raise UserError("--resume_w calibrates activations, which needs --quant_act; add --quant_act")
        if quant.act_dynamic:  # only the weights are calibrated
            return "load"
        if not method.learns:
            raise UserError(
                "--resume_w and the linear method contradict each other (it rounds the weights itself); leave out "
                "--resume_w or --quant_mode linear (--method linear)"
            )
        return "activations"
    if resume:
        return "load"
    if args.cali_ckpt and args.cali_data_path:
        raise UserError(
            "--cali_ckpt and --cali_data_path together are ambiguous; add --resume to sample from the checkpoint, or "
            "--resume_w to calibrate activations for its weights"
        )
    return "load" if args.cali_ckpt else "calibrate"
