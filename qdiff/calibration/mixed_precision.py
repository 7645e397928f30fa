"""Mixed precision: the width of every layer, from sensitivities and a mean width (after MixDQ, arXiv 2405.17873)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from qdiff.calibration.sensitivity import Measure, Operand
from qdiff.calibration.width_allocation import Choice, allocate
from qdiff.config import FLOAT_BITS, LayerBits, QuantConfig
from qdiff.errors import UserError, require_at_least
from qdiff.interface import family_of
from qdiff.wrapping import layer_places, without_prefix

Sensitivities = Mapping[str, Mapping[int, float] | None]
"""Quality by layer and width (`layer_sensitivity`), under the names of `QuantConfig.layer_bits`."""


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
        samples: calibration samples that they are measured on; with ``ssim``, images.

    Raises:
        UserError: a value is out of range; the sentence names the option.
    """

    target: float | None = None
    candidates: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    act_target: float | None = None
    act_candidates: tuple[int, ...] = (4, 6, 8, 16)
    measure: Measure = Measure.SQNR
    samples: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "measure", Measure(self.measure))
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

    def widths(self, operand: Operand) -> tuple[int, ...]:
        """Return the candidates of an operand; none if its widths are not chosen."""
        if operand is Operand.WEIGHTS:
            return () if self.target is None else self.candidates
        return () if self.act_target is None else self.act_candidates


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
    """Choose the widths with the least sum of losses at the targets, weights and inputs each for themselves.

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
    counts = {n: parent._modules[attribute].weight.numel() for n, (_, (parent, attribute)) in places.items()}
    given = {
        Operand.WEIGHTS: (mixed.target, counts, "weight_bits"),
        Operand.ACTIVATIONS: (mixed.act_target, {n: macs[path] for n, (path, _) in places.items()}, "act_bits"),
    }
    chosen: dict[str, dict[str, int]] = {"weight_bits": {}, "act_bits": {}}
    means: dict[Operand, float | None] = dict.fromkeys(Operand)
    for operand, (target, shares, field) in given.items():
        if target is None:
            continue
        found = sensitivities[operand]
        layers = {
            name: Choice(shares[name], {b: mixed.measure.loss(found[name][b]) for b in mixed.widths(operand)})
            for name in layers_to_measure(network, quant, operand)
            if found[name] is not None and shares[name] > 0
        }
        fixed = [
            (shares[name], getattr(quant.of_layer(name, ends), field) or FLOAT_BITS)
            for name in places
            if name not in layers and found.get(name, {}) is not None
        ]
        chosen[field] = allocate(layers, target, fixed)
        counted = [*fixed, *((layers[name].weight, bits) for name, bits in chosen[field].items())]
        means[operand] = _mean(counted)
    names = {*chosen["weight_bits"], *chosen["act_bits"]}
    own = {name: quant.bits_of(name, ends) for name in names}
    made = {
        name: LayerBits(
            chosen["weight_bits"].get(name, own[name].weight_bits), chosen["act_bits"].get(name, own[name].act_bits)
        )
        for name in names
    }
    config = QuantConfig.from_dict({**quant.to_dict(), "layer_bits": {**dict(quant.layer_bits), **made}})
    return Allocation(config, means[Operand.WEIGHTS], means[Operand.ACTIVATIONS])


def _mean(counted: Sequence[tuple[int, int]]) -> float:
    return sum(weight * bits for weight, bits in counted) / sum(weight for weight, _ in counted)
