"""Mixed precision: the width of every layer, from sensitivities and a mean width (after MixDQ, arXiv 2405.17873)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from qdiff.calibration.sensitivity import Measure, Operand
from qdiff.calibration.width_allocation import Choice, PairChoice, allocate, allocate_pairs
from qdiff.config import FLOAT_BITS, LayerBits, QuantConfig
from qdiff.errors import UserError, require_at_least
from qdiff.interface import family_of
from qdiff.wrapping import layer_places, without_prefix

Sensitivities = Mapping[str, Mapping[int, float] | None]
"""Quality by layer and width (`layer_sensitivity`), under the names of `QuantConfig.layer_bits`."""

TRAJECTORIES = 16
_WIDER_WEIGHTS, _WIDER_INPUTS = (4, 5, 6, 8), (5, 6, 8, 10, 16)  # candidates above the mean


@dataclass(frozen=True)
class MixedPrecision:
    """How widths are chosen.

    Attributes:
        target: largest mean width of a weight in bits, over all weights of quantized layers; None keeps their widths.
        candidates: widths of weights to choose from, in bits.
        act_target: likewise of the layers' inputs, over MACs, so that it is the mean of what a MAC costs; the operands
            of attention keep their width. None keeps all.
        act_candidates: widths of inputs to choose from.
        measure: what the sensitivities compare.
        samples: calibration samples that they are measured on; with ``ssim`` and ``trajectory``, images.
        bounded: whether the bit operations may not exceed those of uniform widths either. With both targets they never
            do, and the widths of inputs then have no mean of their own: a wide input may have a narrow weight.

    Raises:
        UserError: a value is out of range; the sentence names the option.
    """

    target: float | None = None
    candidates: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    act_target: float | None = None
    act_candidates: tuple[int, ...] = (4, 6, 8, 16)
    measure: Measure = Measure.SQNR
    samples: int = 32
    bounded: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "measure", Measure(self.measure))
        object.__setattr__(self, "bounded", self.bounded or None not in (self.target, self.act_target))
        require_at_least(1, {"--sensitivity_samples": self.samples})
        for target, widths, option, own, (low, high) in (
            (self.target, self.candidates, "bits", "weights", (1, 8)),
            (self.act_target, self.act_candidates, "act_bits", "activations", (2, 16)),
        ):
            if not widths or any(not low <= bits <= high for bits in widths) or len(set(widths)) < len(widths):
                raise UserError(
                    f"--candidate_{option} is {','.join(map(str, widths))}; give different widths of "
                    f"{own}, from {low} to {high}"
                )
            if target is not None and not (math.isfinite(target) and min(widths) <= target <= max(widths)):
                raise UserError(
                    f"--target_{option} is {target:g}; give a mean width from {min(widths)} to {max(widths)}, between "
                    f"those of --candidate_{option}"
                )

    @classmethod
    def around(cls, quant: QuantConfig, images: int = TRAJECTORIES) -> MixedPrecision:
        """Return the choice at the size and the bit operations of a config's widths, by the sampler's result.

        Inputs keep theirs with dynamic ranges and modulation, whose noise the sensitivities do not tell.

        Args:
            quant: its widths are the means.
            images: trajectories that the sensitivities are measured on.
        """
        return cls(
            target=quant.weight_bits,
            candidates=_around(quant.weight_bits, _WIDER_WEIGHTS) if quant.weight_bits else cls.candidates,
            act_target=quant.act_bits if quant.calibrates_acts else None,
            act_candidates=_around(quant.act_bits, _WIDER_INPUTS) if quant.act_bits else cls.act_candidates,
            measure=Measure.TRAJECTORY,
            samples=images,
            bounded=True,
        )

    def widths(self, operand: Operand) -> tuple[int, ...]:
        """Return the candidates of an operand; none if its widths are not chosen."""
        if operand is Operand.WEIGHTS:
            return () if self.target is None else self.candidates
        return () if self.act_target is None else self.act_candidates


def _around(bits: int, wider: tuple[int, ...]) -> tuple[int, ...]:
    return (*range(min(bits, max(2, bits - 2)), bits + 1), *(width for width in wider if width > bits))


@dataclass(frozen=True)
class Allocation:
    """The chosen widths.

    Attributes:
        quant: the config that was given, with these widths in its ``layer_bits``.
        mean_bits: the mean width of a weight; None if it was not chosen.
        mean_act_bits: likewise of an input, over MACs.
    """

    quant: QuantConfig
    mean_bits: float | None
    mean_act_bits: float | None


def layers_to_measure(network: nn.Module, quant: QuantConfig, operand: Operand) -> dict[str, str]:
    """Return the layers of a float network whose width is not decided yet, and their names in the network.

    What ``layer_bits`` names, and what ``keep_ends`` keeps, has its width.
    """
    family = family_of(network)
    ends, names = without_prefix(family.ends, family.prefix), {}
    for path in layer_places(network):
        name = path.removeprefix(family.prefix)
        own, kept = quant.bits_of(name, ends), quant.keep_ends and ends is not None and name in ends
        if operand is Operand.WEIGHTS:
            decided = own.weight_bits is not None or kept
        else:
            decided = own.act_bits is not None or (kept and name == ends[1])
        if not decided:
            names[name] = path
    return names


def choose_widths(
    network: nn.Module,
    quant: QuantConfig,
    mixed: MixedPrecision,
    sensitivities: Mapping[Operand, Sensitivities],
    macs: Mapping[str, int],
) -> Allocation:
    """Choose the widths with the least sum of losses at the targets: of one operand, or of both together.

    Args:
        network: the float network.
        sensitivities: of the layers in `layers_to_measure`; a layer without any is not called, and keeps its width.
        macs: MACs by a layer's name in the network.

    Raises:
        UserError: a target cannot be reached.
    """
    family = family_of(network)
    ends = without_prefix(family.ends, family.prefix)
    places = {path.removeprefix(family.prefix): (path, where[0]) for path, where in layer_places(network).items()}
    layers = [
        _Layer(name, parent._modules[attribute].weight.numel(), macs[path], quant.of_layer(name, ends))
        for name, (path, (parent, attribute)) in places.items()
    ]
    losses = {
        operand: {
            name: {bits: mixed.measure.loss(values[bits]) for bits in mixed.widths(operand)}
            for name in layers_to_measure(network, quant, operand)
            if (values := sensitivities[operand][name]) is not None
        }
        for operand in Operand
        if mixed.widths(operand)
    }
    called = [layer for layer in layers if all(sensitivities[o].get(layer.name, {}) is not None for o in losses)]
    chosen = _together(called, losses, mixed) if mixed.bounded else _apart(called, losses, mixed)
    means = {
        operand: _mean(
            [(layer.share(operand), chosen[operand].get(layer.name, layer.width(operand))) for layer in called]
        )
        for operand in losses
    }
    weights, inputs = chosen.get(Operand.WEIGHTS, {}), chosen.get(Operand.ACTIVATIONS, {})
    names = dict.fromkeys((*weights, *inputs))
    own = {name: quant.bits_of(name, ends) for name in names}
    made = {
        name: LayerBits(weights.get(name, own[name].weight_bits), inputs.get(name, own[name].act_bits))
        for name in names
    }
    config = QuantConfig.from_dict({**quant.to_dict(), "layer_bits": {**dict(quant.layer_bits), **made}})
    return Allocation(config, means.get(Operand.WEIGHTS), means.get(Operand.ACTIVATIONS))


def check_reachable(network: nn.Module, quant: QuantConfig, mixed: MixedPrecision, macs: Mapping[str, int]) -> None:
    """Raise a `UserError` if no widths meet the targets, before anything is measured.

    Args:
        network, quant, mixed, macs: as in `choose_widths`.
    """
    same = {
        operand: dict.fromkeys(layers_to_measure(network, quant, operand), dict.fromkeys(mixed.widths(operand), 0.0))
        for operand in Operand
    }
    choose_widths(network, quant, mixed, same, macs)


@dataclass(frozen=True)
class _Layer:
    """A layer: its name, what it costs, and its config."""

    name: str
    weights: int
    macs: int
    config: QuantConfig

    def share(self, operand: Operand) -> int:
        """Return how much the width of an operand counts in the mean."""
        return self.weights if operand is Operand.WEIGHTS else self.macs

    def width(self, operand: Operand) -> int:
        """Return the width that it has if none is chosen."""
        return (self.config.weight_bits if operand is Operand.WEIGHTS else self.config.act_bits) or FLOAT_BITS


_Losses = Mapping[Operand, Mapping[str, Mapping[int, float]]]
_Chosen = dict[Operand, dict[str, int]]


def _apart(layers: Sequence[_Layer], losses: _Losses, mixed: MixedPrecision) -> _Chosen:
    """Choose the widths of one operand at its mean."""
    chosen = {}
    for operand, found in losses.items():
        target = mixed.target if operand is Operand.WEIGHTS else mixed.act_target
        free = {x.name: Choice(x.share(operand), found[x.name]) for x in layers if x.name in found and x.share(operand)}
        fixed = [(x.share(operand), x.width(operand)) for x in layers if x.name not in free]
        chosen[operand] = allocate(free, target, fixed)
    return chosen


def _together(layers: Sequence[_Layer], losses: _Losses, mixed: MixedPrecision) -> _Chosen:
    """Choose the widths of weights and inputs within the bits and the bit operations of uniform widths.

    An operand whose widths are not chosen counts with those that layers have.
    """
    of_weights, of_inputs = (losses.get(operand, {}) for operand in (Operand.WEIGHTS, Operand.ACTIVATIONS))
    targets = dict(zip(Operand, (mixed.target, mixed.act_target), strict=True))

    def uniform(layer: _Layer, operand: Operand) -> Fraction:
        target = targets[operand]
        return Fraction(layer.width(operand)) if target is None else Fraction(str(target))

    pairs = {
        layer.name: PairChoice(
            layer.weights,
            layer.macs,
            (
                of_weights.get(layer.name, {layer.width(Operand.WEIGHTS): 0.0}),
                of_inputs.get(layer.name, {layer.width(Operand.ACTIVATIONS): 0.0}),
            ),
        )
        for layer in layers
    }
    bits = sum(layer.weights * uniform(layer, Operand.WEIGHTS) for layer in layers)
    operations = sum(layer.macs * math.prod(uniform(layer, operand) for operand in Operand) for layer in layers)
    chosen = allocate_pairs(pairs, bits, operations)
    return {
        operand: {name: pair[i] for name, pair in chosen.items() if name in losses[operand]}
        for i, operand in enumerate(Operand)
        if operand in losses
    }


def _mean(counted: Sequence[tuple[int, int]]) -> float:
    return sum(weight * bits for weight, bits in counted) / sum(weight for weight, _ in counted)
