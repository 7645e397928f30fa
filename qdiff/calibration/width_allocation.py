"""One width per layer at a given mean width, with the least sum of losses: an integer programme, solved exactly.

With c_ib = 1 if layer i gets width b, else 0: minimise Σ c_ib·loss_ib, with Σ_b c_ib = 1 and Σ c_ib·weight_i·b at most
the target times Σ weight_i (MixDQ's programme, arXiv 2405.17873, section 4.3, with a sum of losses to minimise).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from qdiff.errors import UserError

# HiGHS ends within 1e-6 of the least sum; losses are scaled so that this is far below any difference that matters.
_SCALE = 1e6
# What a solution's binaries may be away from 0 or 1, and so what the budget may be overdrawn by before rounding.
_SLACKS = (0.0, 1e-9, 1e-8, 1e-7, 1e-6)


@dataclass(frozen=True)
class Choice:
    """The widths that one layer may have.

    Attributes:
        weight: how much its width counts in the mean: a whole number above 0, of weights or of MACs.
        losses: the loss, at least 0, by width in bits.
    """

    weight: int
    losses: Mapping[int, float]


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
    budget = Fraction(str(target)) * total - sum(weight * bits for weight, bits in fixed)
    chosen = {name: min(choice.losses) for name, choice in layers.items()}
    if not layers or _used(layers, chosen) > budget:
        least = float((Fraction(str(target)) * total - budget + _used(layers, chosen)) / max(1, total))
        raise UserError(
            f"a mean of {target:g} bits cannot be reached, because the smallest widths have {least:.4g}; give a larger "
            "target, smaller candidates, or fewer layers of their own width"
        )
    useful = {name: _useful(choice) for name, choice in layers.items()}
    best = {name: max(losses) for name, losses in useful.items()}
    if _used(layers, best) <= budget:
        return best
    chosen = _improved(layers, useful, chosen, budget)
    bound = sum(useful[name].get(bits, layers[name].losses[bits]) for name, bits in chosen.items())
    if bound == 0:
        return chosen
    # No loss is negative, so a width that alone loses more than a known solution is in no better one.
    useful = {name: {b: loss for b, loss in losses.items() if loss <= bound} for name, losses in useful.items()}
    return _solved(layers, useful, budget, bound)


def _used(layers: Mapping[str, Choice], chosen: Mapping[str, int]) -> int:
    return sum(layers[name].weight * bits for name, bits in chosen.items())


def _useful(choice: Choice) -> dict[int, float]:
    """Return the losses of the widths that are better than every smaller one."""
    found: dict[int, float] = {}
    for bits, loss in sorted(choice.losses.items()):
        if loss < min(found.values(), default=float("inf")):
            found[bits] = loss
    return found


def _improved(
    layers: Mapping[str, Choice], useful: Mapping[str, Mapping[int, float]], chosen: dict[str, int], budget: Fraction
) -> dict[str, int]:
    """Return a solution that is widened step by step where a bit gains most: good, and an upper bound of the least."""
    chosen, left = dict(chosen), budget - _used(layers, chosen)
    while True:
        steps = [
            ((losses[chosen[name]] - loss) / (layers[name].weight * (bits - chosen[name])), name, bits)
            for name, losses in useful.items()
            for bits, loss in losses.items()
            if bits > chosen[name] and layers[name].weight * (bits - chosen[name]) <= left
        ]
        if not steps:
            return chosen
        _, name, bits = max(steps)
        left -= layers[name].weight * (bits - chosen[name])
        chosen[name] = bits


def _solved(
    layers: Mapping[str, Choice], useful: Mapping[str, Mapping[int, float]], budget: Fraction, bound: float
) -> dict[str, int]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    pairs = [(name, bits) for name, losses in useful.items() for bits in losses]
    rows = {name: i for i, name in enumerate(useful)}
    places = [rows[name] for name, _ in pairs], range(len(pairs))
    one_each = csr_matrix((np.ones(len(pairs)), places), shape=(len(rows), len(pairs)))
    widths = np.array([layers[name].weight * bits for name, bits in pairs], dtype=float)
    losses = np.array([useful[name][bits] for name, bits in pairs]) * (_SCALE / bound)
    for slack in _SLACKS:
        found = milp(
            losses,
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(widths[None] / float(budget), -np.inf, 1 - slack),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            break
        chosen = {name: bits for (name, bits), taken in zip(pairs, found.x, strict=True) if taken > 0.5}
        if _used(layers, chosen) <= budget:
            return chosen
    raise RuntimeError(f"the integer programme has no solution: {found.message}")
