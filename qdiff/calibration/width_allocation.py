"""Widths of layers within given budgets, with the least sum of losses: an integer programme.

With c_io = 1 if layer i gets option o, else 0: minimise Σ c_io·loss_io, with Σ_o c_io = 1 and, for every budget,
Σ c_io·cost_io at most the budget (MixDQ's programme, arXiv 2405.17873, section 4.3, with a sum of losses to minimise
and any number of budgets). An option is a width, or a pair of widths of both operands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from qdiff.errors import UserError

Pair = tuple[int, int]
"""The widths of a layer's weight and of its input."""
Budget = int | Fraction

# HiGHS ends within 1e-6 of the least sum; losses are scaled so that this is far below any difference that matters.
_SCALE = 1e6
# What a solution's binaries may be away from 0 or 1, and so what a budget may be overdrawn by before rounding.
_SLACKS = (0.0, 1e-9, 1e-8, 1e-7, 1e-6)
# Of two budgets, the least sum within this share: proving the last bit of it may take hours.
_GAP = 1e-4


@dataclass(frozen=True)
class Choice:
    """The widths that one layer may have.

    Attributes:
        weight: how much its width counts in the mean: a whole number above 0, of weights or of MACs.
        losses: the loss, at least 0, by width in bits.
    """

    weight: int
    losses: Mapping[int, float]


@dataclass(frozen=True)
class PairChoice:
    """The pairs of widths that one layer may have.

    Attributes:
        weights, macs: number of weights, above 0, and of MACs.
        losses: of its weight's width and of its input's width, which add up; each at least 0, by width in bits.
    """

    weights: int
    macs: int
    losses: tuple[Mapping[int, float], Mapping[int, float]]


@dataclass(frozen=True)
class _Option:
    """What a layer may have: its loss, and what it costs of each budget."""

    loss: float
    costs: tuple[int, ...]


_Layers = Mapping[str, Mapping[int | Pair, _Option]]
_Chosen = dict[str, int | Pair]


class _TooLittle(ValueError):
    """The cheapest options exceed a budget.

    Attributes:
        used: what they cost of each budget.
    """

    def __init__(self, used: Sequence[int]) -> None:
        super().__init__(f"the least costs are {used}")
        self.used = used


def allocate(layers: Mapping[str, Choice], target: float, fixed: Sequence[tuple[int, int]] = ()) -> dict[str, int]:
    """Return the width of every layer for which the sum of losses is least.

    Args:
        layers: the layers to choose for, by name.
        target: largest mean width in bits.
        fixed: (weight, width) of layers whose width is decided already; they count in the mean.

    Raises:
        UserError: the target is below the mean of the smallest widths.
    """
    total = sum(choice.weight for choice in layers.values()) + sum(weight for weight, _ in fixed)
    decided = sum(weight * bits for weight, bits in fixed)
    options = {
        name: {bits: _Option(loss, (choice.weight * bits,)) for bits, loss in choice.losses.items()}
        for name, choice in layers.items()
    }
    try:
        return _allocated(options, [Fraction(str(target)) * total - decided])
    except _TooLittle as error:
        least = (error.used[0] + decided) / max(1, total)
        raise UserError(
            f"a mean of {target:g} bits cannot be reached, because the smallest widths have {least:.4g}; give a larger "
            "target, smaller candidates, or fewer layers of their own width"
        ) from None


def allocate_pairs(layers: Mapping[str, PairChoice], bits: Budget, operations: Budget) -> dict[str, Pair]:
    """Return both widths of every layer for which the sum of losses is least.

    Args:
        layers: the layers to choose for, by name.
        bits: most bits of all their weights.
        operations: most bit operations, Σ MACs · weight bits · input bits.

    Raises:
        UserError: the smallest widths exceed a budget.
    """
    options = {
        name: {
            (w, a): _Option(of_weight + of_input, (choice.weights * w, choice.macs * w * a))
            for w, of_weight in choice.losses[0].items()
            for a, of_input in choice.losses[1].items()
        }
        for name, choice in layers.items()
    }
    try:
        return _allocated(options, [bits, operations])
    except _TooLittle as error:
        short = "bits of weights" if error.used[0] > bits else "bit operations"
        raise UserError(
            f"the smallest widths to choose from need more {short} than the targets allow; give larger targets, "
            "smaller candidates, or fewer layers of their own width"
        ) from None


def _allocated(layers: _Layers, budgets: Sequence[Budget]) -> _Chosen:
    useful = {name: _useful(options) for name, options in layers.items()}
    cheapest = {name: min(options, key=lambda o: options[o].costs) for name, options in useful.items()}
    limits = [math.floor(budget) for budget in budgets]  # costs are whole numbers
    if not layers or not _fits(useful, cheapest, limits):
        raise _TooLittle(_used(useful, cheapest, limits))
    best = {name: min(options, key=lambda o: options[o].loss) for name, options in useful.items()}
    if _fits(useful, best, limits):
        return best
    chosen = _improved(useful, cheapest, limits)
    bound = sum(useful[name][option].loss for name, option in chosen.items())
    if bound == 0:
        return chosen
    # No loss is negative, so an option that alone loses more than a known solution is in no better one.
    useful = {n: {o: option for o, option in options.items() if option.loss <= bound} for n, options in useful.items()}
    return _solved(useful, limits, bound)


def _used(layers: _Layers, chosen: _Chosen, budgets: Sequence[int]) -> list[int]:
    return [sum(layers[name][option].costs[i] for name, option in chosen.items()) for i in range(len(budgets))]


def _fits(layers: _Layers, chosen: _Chosen, budgets: Sequence[int]) -> bool:
    return all(used <= budget for used, budget in zip(_used(layers, chosen, budgets), budgets, strict=True))


def _useful(options: Mapping[int | Pair, _Option]) -> dict[int | Pair, _Option]:
    """Return the options that no other one equals or beats in its loss and in every cost, the cheapest first."""
    found: dict[int | Pair, _Option] = {}
    for key, option in sorted(options.items(), key=lambda item: (item[1].costs, item[1].loss)):
        if not any(
            better.loss <= option.loss and all(a <= b for a, b in zip(better.costs, option.costs, strict=True))
            for better in found.values()
        ):
            found[key] = option
    return found


def _improved(layers: _Layers, chosen: _Chosen, budgets: Sequence[int]) -> _Chosen:
    """Return a solution that is widened step by step where most is gained: good, and an upper bound of the least."""
    places = [(name, key) for name, options in layers.items() for key in options]
    number = {place: i for i, place in enumerate(places)}
    first = {name: number[name, next(iter(options))] for name, options in layers.items()}
    of_layer = np.repeat(list(first.values()), [len(options) for options in layers.values()])
    losses = np.array([layers[name][key].loss for name, key in places])
    costs = np.array([layers[name][key].costs for name, key in places])
    now = np.zeros(len(places), dtype=int)  # the option that the layer of each place has
    for name, key in chosen.items():
        now[of_layer == first[name]] = number[name, key]
    left = np.array(budgets) - np.array(_used(layers, chosen, budgets))
    while True:
        gains, more = losses[now] - losses, costs - costs[now]
        allowed = (gains > 0) & (more <= left).all(1)
        if not allowed.any():
            return {places[i][0]: places[i][1] for i in sorted(set(now.tolist()))}
        shares = np.maximum((more / np.maximum(budgets, 1)).max(1), 1e-12)
        best = int(np.argmax(np.where(allowed, gains / shares, -1.0)))
        left = left - more[best]
        now[of_layer == of_layer[best]] = best


def _solved(layers: _Layers, budgets: Sequence[int], bound: float) -> _Chosen:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    places = [(name, key) for name, options in layers.items() for key in options]
    rows = {name: i for i, name in enumerate(layers)}
    cells = [rows[name] for name, _ in places], range(len(places))
    one_each = csr_matrix((np.ones(len(places)), cells), shape=(len(rows), len(places)))
    costs = np.array(
        [[layers[n][key].costs[i] / max(budget, 1) for n, key in places] for i, budget in enumerate(budgets)]
    )
    losses = np.array([layers[name][key].loss for name, key in places]) * (_SCALE / bound)
    for slack in _SLACKS:
        found = milp(
            losses,
            integrality=np.ones(len(places)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs, -np.inf, 1 - slack)],
            options={"mip_rel_gap": 0.0 if len(budgets) == 1 else _GAP},
        )
        if found.x is None:
            break
        chosen = {name: key for (name, key), taken in zip(places, found.x, strict=True) if taken > 0.5}
        if _fits(layers, chosen, budgets):
            return chosen
    raise RuntimeError(f"the integer programme has no solution: {found.message}")
