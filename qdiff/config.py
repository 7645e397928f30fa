"""Quantization settings: what to quantize and at which widths, in one frozen, self-validating class."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from qdiff.errors import UserError
from qdiff.ranges.estimators import ESTIMATORS, RangeMethod

END_BITS = 8
_OF_MODULATION = ("modulate", "rest_bits", "ablation")
_LATER = ("keep_ends", "act_dynamic", "act_scale_per", *_OF_MODULATION, "act_ranges")


class ScalePer(str, Enum):
    """Granularity of dynamic ranges: what shares one range."""

    TENSOR = "tensor"  # the whole batch
    SAMPLE = "sample"
    CHANNEL = "channel"  # one channel of all samples


class ActRanges(str, Enum):
    """What shares one calibrated range of a quantizer."""

    SHARED = "shared"  # all timesteps
    TIMESTEP = "timestep"  # the timesteps from one calibrated timestep to the next


class Ablation(str, Enum):
    """The part of modulation that is left out, to show its effect."""

    NO_COMPENSATION = "no-compensation"  # changes relative to the last input, not its reconstruction: errors add up
    CLEARED_STATE = "cleared-state"  # state cleared before every step: no activation is quantized


@dataclass(frozen=True)
class QuantConfig:
    """Widths and ranges of a quantized network.

    Attributes:
        weight_bits: width of weights, 1 to 8; None keeps them in float.
        act_bits: width of activations, 2 to 16; None keeps them in float.
        act_symmetric: activations use a zero point in the middle of the levels (the papers' ``--a_sym``).
        softmax_bits: width of the softmax output in attention, 2 to 16.
        split_shortcut: layers that consume a concatenation get quantizers for each part (``--split``).
        weight_symmetric: likewise for weights.
        weight_range, act_range: how ranges are chosen from data: names of `qdiff.ranges.estimators.ESTIMATORS`.
        keep_ends: weights of the first and the last layer get 8 bits regardless of ``weight_bits``, and the last
            layer's input stays in float (EDA-DM).
        act_dynamic: activation ranges are dynamic: computed at every call, without calibration.
        act_scale_per: what shares a dynamic range.
        modulate: layers quantize the change of their input since the previous step of the trajectory (MoDiff), inside
            ``QuantModel.trajectory``.
        rest_bits: width, 2 to 16, of the tensors that the published code leaves in float with dynamic ranges or
            modulation: the operands of attention's two products, and a modulated layer's input at the first step. Their
            ranges are dynamic. None leaves them in float.
        ablation: the part of modulation to leave out; None leaves out nothing.
        act_ranges: what shares one calibrated range; ``timestep`` gives each quantizer a table with a range for each
            timestep of the calibration set (`qdiff.ranges.calibrated_timesteps`), which is observed and not learned.

    Raises:
        UserError: a value is out of range, or fields contradict each other; the sentence names the option.
    """

    weight_bits: int | None = 8
    act_bits: int | None = None
    act_symmetric: bool = False
    softmax_bits: int = 8
    split_shortcut: bool = False
    weight_symmetric: bool = False
    weight_range: str = RangeMethod.MIN_MAX
    act_range: str = RangeMethod.MIN_MAX
    keep_ends: bool = False
    act_dynamic: bool = False
    act_scale_per: ScalePer = ScalePer.TENSOR
    modulate: bool = False
    rest_bits: int | None = None
    ablation: Ablation | None = None
    act_ranges: ActRanges = ActRanges.SHARED

    def __post_init__(self) -> None:
        for name, low, high, option in (
            ("weight_bits", 1, 8, "--weight_bit"),
            ("act_bits", 2, 16, "--act_bit"),
            ("softmax_bits", 2, 16, "--sm_abit"),
            ("rest_bits", 2, 16, "--rest_abit"),
        ):
            bits = getattr(self, name)
            if bits is None and name != "softmax_bits":
                continue
            if not (isinstance(bits, int) and low <= bits <= high):
                raise UserError(f"{name} is {bits}; give {option} a whole number from {low} to {high}")
        for name in ("weight_range", "act_range"):
            if getattr(self, name) not in tuple(ESTIMATORS):
                raise UserError(f"{name} is {getattr(self, name)}; give it one of {', '.join(ESTIMATORS)}")
        self._make_enum("act_scale_per", ScalePer)
        self._make_enum("act_ranges", ActRanges)
        if self.ablation is not None:
            self._make_enum("ablation", Ablation)
        self._check_dynamics()

    def _make_enum(self, name: str, kind: type[Enum]) -> None:
        try:
            object.__setattr__(self, name, kind(getattr(self, name)))
        except ValueError:
            raise UserError(
                f"{name} is {getattr(self, name)}; give it one of {', '.join(k.value for k in kind)}"
            ) from None

    def _check_dynamics(self) -> None:
        if self.modulate and self.act_bits is None:
            raise UserError("modulation needs quantized activations; add --quant_act, or leave out --modulate")
        if self.act_dynamic and self.act_bits is None:
            raise UserError(
                "dynamic ranges need quantized activations; add --quant_act, or leave out --quant_mode dynamic"
            )
        if self.act_scale_per is not ScalePer.TENSOR and not self.act_dynamic:
            raise UserError(
                f"one range per {self.act_scale_per.value} needs dynamic ranges; add --quant_mode "
                "dynamic, or leave out --act_tensor and --act_scale_per"
            )
        if self.rest_bits is not None and not (self.modulate or self.act_dynamic):
            raise UserError(
                "--rest_abit needs --modulate or --quant_mode dynamic; add one of them, or leave --rest_abit out"
            )
        if self.act_ranges is not ActRanges.SHARED:
            self._check_act_ranges()
        if self.ablation is not None and not self.modulate:
            raise UserError(
                f"the ablation {self.ablation.value} needs modulation; add --modulate, or leave out --modulate_ablation"
            )

    def _check_act_ranges(self) -> None:
        option = f"--act_ranges {self.act_ranges.value}"
        if self.act_bits is None:
            raise UserError(f"{option} needs quantized activations; add --quant_act, or leave --act_ranges out")
        for given, other in ((self.act_dynamic, "--quant_mode dynamic"), (self.modulate, "--modulate")):
            if given:
                raise UserError(
                    f"{option} calibrates ranges of activations and contradicts {other}; leave one of them out"
                )

    @property
    def calibrates_acts(self) -> bool:
        """Whether a method sets the ranges of the activations themselves."""
        return self.act_bits is not None and not (self.act_dynamic or self.modulate)

    @property
    def calibrates_changes(self) -> bool:
        """Whether calibration sets the ranges of the activations' changes from step to step."""
        return self.modulate and not self.act_dynamic

    @property
    def attention_widths(self) -> tuple[int, int] | None:
        """Width of q, k and v, and of the softmax output; None leaves attention's products in float."""
        if self.act_bits is None:
            return None
        if self.act_dynamic or self.modulate:
            return None if self.rest_bits is None else (self.rest_bits, self.rest_bits)
        return self.act_bits, self.softmax_bits

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON.

        Fields added later are left out at their defaults, so the result equals what was written before they existed.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for f in fields(self):
            if f.name in _LATER and values[f.name] == f.default:
                del values[f.name]
        return {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}

    def of_layer(self, name: str, ends: tuple[str, str] | None) -> QuantConfig:
        """Return the config of one layer.

        Args:
            ends: names of the network's first and last layer.
        """
        if not self.keep_ends or ends is None or name not in ends:
            return self
        weight_bits = None if self.weight_bits is None else END_BITS
        if name == ends[0]:
            return replace(self, weight_bits=weight_bits)
        of_acts = ("act_dynamic", "act_scale_per", *_OF_MODULATION, "act_ranges")
        off = {name: getattr(type(self), name) for name in of_acts}
        return replace(self, weight_bits=weight_bits, act_bits=None, **off)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Inverse of `to_dict`; unknown names are an error."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(
                f"quantization config has unknown fields {sorted(unknown)}; update qdiff if a newer version wrote it"
            )
        return cls(**values)
