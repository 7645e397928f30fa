"""What to quantize and how wide: one frozen, self-validating description."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from qdiff.errors import UserError
from qdiff.ranges.estimators import ESTIMATORS, RangeMethod

END_BITS = 8
_OF_MODULATION = ("modulate", "rest_bits", "ablation")
_LATER = ("keep_ends", "act_dynamic", "act_scale_per", *_OF_MODULATION)


class ScalePer(str, Enum):
    """What shares one dynamic range."""

    TENSOR = "tensor"  # the whole batch
    SAMPLE = "sample"
    CHANNEL = "channel"  # of all samples


class Ablation(str, Enum):
    """What modulation goes without, to show what it is for."""

    NO_COMPENSATION = "no-compensation"  # changes are taken to the last input, not to its reconstruction: errors add up
    CLEARED_STATE = "cleared-state"  # the memory is emptied before every step: no activation is quantized


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
        weight_range, act_range: how ranges are chosen from data, names in `qdiff.ranges.estimators.ESTIMATORS`.
        keep_ends: the first and the last layer's weights get 8 bits whatever ``weight_bits`` says, and the last layer's
            input stays in float (EDA-DM).
        act_dynamic: activation ranges are dynamic, computed at every call, so there is nothing to calibrate.
        act_scale_per: what shares a dynamic range.
        modulate: layers quantize the change of their input since the last step of the trajectory (MoDiff), inside
            ``QuantModel.trajectory``.
        rest_bits: width, 2 to 16, for what the published code leaves in float where ranges are dynamic or layers
            modulate: the operands of attention's two products, and a modulated layer's input at the first step. Their
            ranges are dynamic. None leaves them in float.
        ablation: of modulation; None is all of it.

    Raises:
        UserError: a value out of range, or fields that contradict each other; the sentence names the option.
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
            raise UserError("modulation is of quantized activations; add --quant_act, or leave out --modulate")
        if self.act_dynamic and self.act_bits is None:
            raise UserError(
                "dynamic ranges are of quantized activations; add --quant_act, or leave out --quant_mode dynamic"
            )
        if self.act_scale_per is not ScalePer.TENSOR and not self.act_dynamic:
            raise UserError(
                f"one range per {self.act_scale_per.value} is for dynamic ranges; add --quant_mode "
                "dynamic, or leave out --act_tensor and --act_scale_per"
            )
        if self.rest_bits is not None and not (self.modulate or self.act_dynamic):
            raise UserError("--rest_abit is for --modulate and --quant_mode dynamic; leave it out, or add one of them")
        if self.ablation is not None and not self.modulate:
            raise UserError(f"the ablation {self.ablation.value} is of modulation; add --modulate, or leave it out")

    @property
    def calibrates_acts(self) -> bool:
        """Whether the ranges of activations themselves are state that a method sets."""
        return self.act_bits is not None and not (self.act_dynamic or self.modulate)

    @property
    def calibrates_changes(self) -> bool:
        """Whether the ranges of activations' changes from step to step are state that calibration sets."""
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

        Fields that came later are left out at their defaults: what was written before them means the same.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for f in fields(self):
            if f.name in _LATER and values[f.name] == f.default:
                del values[f.name]
        return {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}

    def of_layer(self, name: str, ends: tuple[str, str] | None) -> QuantConfig:
        """Return what holds for one layer.

        Args:
            ends: names of the network's first and last layer.
        """
        if not self.keep_ends or ends is None or name not in ends:
            return self
        weight_bits = None if self.weight_bits is None else END_BITS
        if name == ends[0]:
            return replace(self, weight_bits=weight_bits)
        off = {name: getattr(type(self), name) for name in ("act_dynamic", "act_scale_per", *_OF_MODULATION)}
        return replace(self, weight_bits=weight_bits, act_bits=None, **off)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Inverse of `to_dict`; unknown names are an error."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(f"quantization config has unknown fields {sorted(unknown)}; a newer qdiff wrote it?")
        return cls(**values)
