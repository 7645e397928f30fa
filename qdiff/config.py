"""Quantization settings: what to quantize and at which widths, in one frozen, self-validating class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from qdiff.errors import UserError
from qdiff.ranges.estimators import ESTIMATORS, RangeMethod

END_BITS = 8
FLOAT_BITS = 32  # the width of floats, and how `LayerBits` leaves a weight or an input in float
FIRST, LAST = "first", "last"  # in `QuantConfig.layer_bits`, the layers that are a network's ends
_WEIGHT_WIDTHS, _ACT_WIDTHS = (1, 8), (2, 16)
_OF_MODULATION = ("modulate", "rest_bits", "ablation")
_OF_ACTS = ("act_dynamic", "act_scale_per", "act_ranges", "power_of_two_scales", *_OF_MODULATION)
_LATER = ("keep_ends", "layer_bits", "bos_aware", *_OF_ACTS)


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
class LayerBits:
    """Widths of one layer where they differ from the network's, written ``W8A16``, ``W8`` or ``A16``.

    Attributes:
        weight_bits: width of the weight, 1 to 8, or 32 for float; None takes the network's.
        act_bits: width of the input, or of q, k and v, 2 to 16, or 32 for float; None takes the network's.

    Raises:
        UserError: a width is out of range.
    """

    weight_bits: int | None = None
    act_bits: int | None = None

    def __post_init__(self) -> None:
        for bits, (low, high) in ((self.weight_bits, _WEIGHT_WIDTHS), (self.act_bits, _ACT_WIDTHS)):
            if bits is not None and not (_is_whole(bits) and (low <= bits <= high or bits == FLOAT_BITS)):
                raise UserError(_wrong_widths(bits))

    @classmethod
    def parse(cls, text: str) -> LayerBits:
        """Inverse of `str`."""
        found = re.fullmatch(r"(?:W(\d+))?(?:A(\d+))?", str(text).strip().upper())
        if found is None or found[0] == "":
            raise UserError(_wrong_widths(repr(text)))
        return cls(*(None if bits is None else int(bits) for bits in found.groups()))

    def __str__(self) -> str:
        parts = (("W", self.weight_bits), ("A", self.act_bits))
        return "".join(f"{letter}{bits}" for letter, bits in parts if bits is not None)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong_widths(given: Any) -> str:
    return (
        f"a layer's width is {given}; write W8A16, W8 or A16, with weights of {_WEIGHT_WIDTHS[0]} to "
        f"{_WEIGHT_WIDTHS[1]} bits and activations of {_ACT_WIDTHS[0]} to {_ACT_WIDTHS[1]}, or {FLOAT_BITS} for float"
    )


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
        rest_bits: width, 2 to 16, of what the published code leaves in float with dynamic ranges or modulation: what
            attention multiplies, a modulated layer's first input. Their ranges are dynamic; None leaves them in float.
        ablation: the part of modulation to leave out; None leaves out nothing.
        act_ranges: what shares one calibrated range; ``timestep`` gives each quantizer a table with a range for each
            timestep of the calibration set (`qdiff.ranges.calibrated_timesteps`), which is observed and not learned.
        layer_bits: layers with widths of their own, by name: ``{"conv_in": "W8A16", "last": "A32"}`` or pairs of names
            and `LayerBits`, which are kept in order of names. ``first`` and ``last`` are the network's ends; a layer's
            own name counts before them, and both before ``keep_ends``. An attention is named like a layer.
        power_of_two_scales: channels of what shortcut convolutions take may have 1/2, 1/4 or 1/8 of the step size, as
            the calibration samples vote (DMQ's PTS; `qdiff.calibration.power_of_two`).
        bos_aware: linear layers that read a text context do not quantize its first token, which is the same for all
            texts; its output is a constant, computed in float (MixDQ).

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
    layer_bits: tuple[tuple[str, LayerBits], ...] | Mapping[str, LayerBits | str] = ()
    power_of_two_scales: bool = False
    bos_aware: bool = False

    def __post_init__(self) -> None:
        for name, (low, high), option in (
            ("weight_bits", _WEIGHT_WIDTHS, "--weight_bit"),
            ("act_bits", _ACT_WIDTHS, "--act_bit"),
            ("softmax_bits", _ACT_WIDTHS, "--sm_abit"),
            ("rest_bits", _ACT_WIDTHS, "--rest_abit"),
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
        self._make_layer_bits()

    def _make_enum(self, name: str, kind: type[Enum]) -> None:
        try:
            object.__setattr__(self, name, kind(getattr(self, name)))
        except ValueError:
            raise UserError(
                f"{name} is {getattr(self, name)}; give it one of {', '.join(k.value for k in kind)}"
            ) from None

    def _make_layer_bits(self) -> None:
        made = {n: b if isinstance(b, LayerBits) else LayerBits.parse(b) for n, b in dict(self.layer_bits).items()}
        object.__setattr__(self, "layer_bits", tuple(sorted((n, b) for n, b in made.items() if b != LayerBits())))
        for name, bits in self.layer_bits:
            for kind, width, own, option in (
                ("weights", self.weight_bits, bits.weight_bits, "--weight_bit"),
                ("activations", self.act_bits, bits.act_bits, "--quant_act"),
            ):
                if width is None and own not in (None, FLOAT_BITS):
                    raise UserError(
                        f"--layer_bits gives {name} {bits}, but {kind} are not quantized; add {option}, or leave it out"
                    )

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
            self._check_calibrated("act_ranges", f"--act_ranges {self.act_ranges.value}")
        if self.power_of_two_scales:
            self._check_calibrated("power_of_two_scales", "--power_of_two_scales")
        if self.ablation is not None and not self.modulate:
            raise UserError(
                f"the ablation {self.ablation.value} needs modulation; add --modulate, or leave out --modulate_ablation"
            )

    def _check_calibrated(self, name: str, option: str) -> None:
        if self.act_bits is None:
            raise UserError(f"{option} needs quantized activations; add --quant_act, or leave --{name} out")
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
        """Return plain values, for JSON; fields that came later are left out at their defaults, as files had them."""
        kept = (f for f in fields(self) if f.name not in _LATER or getattr(self, f.name) != f.default)
        values = {f.name: getattr(self, f.name) for f in kept}
        if self.layer_bits:
            values["layer_bits"] = {name: str(bits) for name, bits in self.layer_bits}
        return {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}

    def of_layer(self, name: str, ends: tuple[str, str] | None) -> QuantConfig:
        """Return the config of one layer; ``ends`` are the names of the network's first and last layer."""
        weight_bits, act_bits = self.weight_bits, self.act_bits
        if self.keep_ends and ends is not None and name in ends:
            weight_bits = None if weight_bits is None else END_BITS
            act_bits = act_bits if name == ends[0] else None
        own = self.bits_of(name, ends)
        weight_bits, act_bits = _chosen(own.weight_bits, weight_bits), _chosen(own.act_bits, act_bits)
        if (weight_bits, act_bits) == (self.weight_bits, self.act_bits):
            return self
        return replace(self, weight_bits=weight_bits, layer_bits=(), **self._acts_of(act_bits))

    def of_attention(self, name: str) -> QuantConfig:
        """Return the config of one attention; `attention_widths` are its own."""
        own = self.bits_of(name, None).act_bits
        if own is None:
            return self
        config = replace(self, layer_bits=(), **self._acts_of(_chosen(own, None)))
        return replace(config, rest_bits=own) if config.act_dynamic or config.modulate else config

    def bits_of(self, name: str, ends: tuple[str, str] | None) -> LayerBits:
        """Return what `layer_bits` says about a layer; arguments as in `of_layer`."""
        given = dict(self.layer_bits)
        symbols = [symbol for symbol, end in zip((FIRST, LAST), ends or (), strict=False) if end == name]
        return next((given[known] for known in (name, *symbols) if known in given), LayerBits())

    def named_layers(self, ends: tuple[str, str] | None) -> set[str]:
        """Return the names in `layer_bits`, those of the ends in place of ``first`` and ``last``."""
        own = dict(zip((FIRST, LAST), ends or (), strict=False))
        return {own.get(name, name) for name, _ in self.layer_bits}

    def _acts_of(self, bits: int | None) -> dict[str, Any]:
        """Return the fields of activations of a width; without one, nothing is dynamic or modulated."""
        if bits is not None:
            return {"act_bits": bits}
        return {"act_bits": None, **{name: getattr(type(self), name) for name in _OF_ACTS}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantConfig:
        """Inverse of `to_dict`; unknown names are an error."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise UserError(
                f"quantization config has unknown fields {sorted(unknown)}; update qdiff if a newer version wrote it"
            )
        return cls(**values)


def _chosen(own: int | None, otherwise: int | None) -> int | None:
    """Return a layer's width, None for float: its own if it has one."""
    return otherwise if own is None else None if own == FLOAT_BITS else own
