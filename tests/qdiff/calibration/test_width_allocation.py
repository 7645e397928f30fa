"""The integer programme against trying every allocation, and what it does at the edges."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

from qdiff.calibration.width_allocation import Choice, PairChoice, allocate, allocate_pairs
from qdiff.errors import UserError

TOLERANCE = 1e-9  # relative, of the sum of losses


def total(layers, chosen):
    return sum(layers[name].losses[bits] for name, bits in chosen.items())


def used(layers, chosen, fixed=()):
    return sum(layers[n].weight * bits for n, bits in chosen.items()) + sum(w * b for w, b in fixed)


def brute_force(layers, target, fixed=()):
    """Return the least sum of losses of all allocations within the budget, and the second least; None without one."""
    weights = sum(c.weight for c in layers.values()) + sum(w for w, _ in fixed)
    budget, sums = Fraction(str(target)) * weights - sum(w * b for w, b in fixed), set()
    for taken in itertools.product(*([(c.weight * b, loss) for b, loss in c.losses.items()] for c in layers.values())):
        if sum(cost for cost, _ in taken) <= budget:
            sums.add(sum(loss for _, loss in taken))
    return sorted(sums)[:2] or None


def instance(seed):
    """Layers of 1 to 4, whose losses fall by powers of ten or not at all, with ties and with layers that are alike."""
    draw = random.Random(seed)
    widths = draw.choice([(2, 4, 8), (2, 3, 4, 5, 6, 8), (4, 8), (3,)])
    layers = {}
    for i in range(draw.randint(1, 4)):
        scale = 10 ** draw.uniform(-8, 0)
        losses = {b: scale * draw.choice([4.0**-b, draw.random(), 0.25, 0.0]) for b in widths}
        layers[f"layer{i}"] = Choice(draw.choice([1, 2, 9, 64, 10_001, 2_359_296]), losses)
    fixed = [(draw.choice([3, 5_000]), draw.choice([8, 32]))] if draw.random() < 0.3 else []
    target = draw.choice([2.5, 3, 4, 4.5, 4.75, 5, round(draw.uniform(2, 8), 3)])
    return layers, target, fixed


@pytest.mark.parametrize("block", range(2))
def test_it_is_the_best_of_all(block):
    worse = 0
    for seed in range(50 * block, 50 * block + 50):
        layers, target, fixed = instance(seed)
        best = brute_force(layers, target, fixed)
        if best is None:
            with pytest.raises(UserError, match="cannot be reached"):
                allocate(layers, target, fixed)
            continue
        chosen = allocate(layers, target, fixed)
        weights = sum(c.weight for c in layers.values()) + sum(w for w, _ in fixed)
        assert chosen.keys() == layers.keys()
        assert used(layers, chosen, fixed) <= Fraction(str(target)) * weights, seed
        assert total(layers, chosen) <= best[0] * (1 + TOLERANCE), seed
        worse += len(best) > 1 and best[1] > best[0] * (1 + TOLERANCE)  # planted: the second best would not pass
    assert worse > 15


def test_widening_step_by_step_is_not_enough():
    """Where the best gain per bit is taken first, the budget does not suffice for what saves more."""
    layers = {"small": Choice(3, {2: 4.0, 4: 0.0}), "large": Choice(5, {2: 6.0, 4: 0.0})}
    assert allocate(layers, 3.25) == {"small": 2, "large": 4}
    assert brute_force(layers, 3.25)[0] == 4.0


def test_a_width_that_is_no_better_is_not_taken():
    assert allocate({"a": Choice(7, {2: 0.5, 4: 0.5, 8: 0.25})}, 5) == {"a": 2}
    assert allocate({"a": Choice(7, {2: 0.5, 4: 0.0, 8: 0.0})}, 8) == {"a": 4}


def test_a_target_that_is_met_exactly():
    layers = {f"l{i}": Choice(1_000_003, {4: 1.0 / (i + 1), 5: 0.0}) for i in range(8)}
    chosen = allocate(layers, 4.5)
    assert [n for n, bits in chosen.items() if bits == 5] == ["l0", "l1", "l2", "l3"]


def test_fixed_layers_count():
    layers = {"a": Choice(10, {2: 1.0, 4: 0.5})}
    assert allocate(layers, 4) == {"a": 4}
    assert allocate(layers, 4, [(2, 8)]) == {"a": 2}
    with pytest.raises(UserError, match="a mean of 4 bits cannot be reached, because the smallest widths have 22"):
        allocate(layers, 4, [(20, 32)])


def test_a_hundred_layers():
    draw = random.Random(0)
    layers = {
        str(i): Choice(draw.randint(1000, 9_000_000), {b: draw.random() * 4.0**-b for b in (2, 3, 4, 5, 6, 8)})
        for i in range(100)
    }
    chosen = allocate(layers, 4.5)
    mean = used(layers, chosen) / sum(c.weight for c in layers.values())
    assert 4.499 < mean <= 4.5


def pairs(seed):
    """Layers of 1 to 3 with widths of both operands, and budgets that some allocation fits."""
    draw = random.Random(seed)
    layers = {}
    for i in range(draw.randint(1, 3)):
        scale = 10 ** draw.uniform(-4, 0)
        losses = [
            {b: scale * draw.choice([4.0**-b, draw.random() * 4.0**-b, 0.0]) for b in widths}
            for widths in ((2, 3, 4, 6), (4, 6, 8, 16))
        ]
        layers[f"layer{i}"] = PairChoice(draw.choice([9, 64, 10_001]), draw.choice([0, 64, 5_000]), tuple(losses))
    bits = draw.choice([3, 4]) * sum(c.weights for c in layers.values())
    return layers, bits, draw.choice([20, 32]) * sum(c.macs for c in layers.values())


def test_pairs_are_the_best_of_all():
    worse = 0
    for seed in range(40):
        layers, bits, operations = pairs(seed)
        sums = set()
        for taken in itertools.product(*(itertools.product(*c.losses) for c in layers.values())):
            choices = list(zip(layers.values(), taken, strict=True))
            if (
                sum(c.weights * w for c, (w, _) in choices) <= bits
                and sum(c.macs * w * a for c, (w, a) in choices) <= operations
            ):
                sums.add(sum(c.losses[0][w] + c.losses[1][a] for c, (w, a) in choices))
        chosen = allocate_pairs(layers, bits, operations)
        loss = sum(layers[n].losses[0][w] + layers[n].losses[1][a] for n, (w, a) in chosen.items())
        assert sum(layers[n].weights * w for n, (w, _) in chosen.items()) <= bits
        assert sum(layers[n].macs * w * a for n, (w, a) in chosen.items()) <= operations
        best = sorted(sums)[:2]
        assert loss <= best[0] * (1 + 2e-4) + 1e-300, seed  # of two budgets, within 1e-4 of the least
        worse += len(best) > 1 and best[1] > best[0] * (1 + 2e-4)
    assert worse > 15


def test_pairs_that_no_budget_fits():
    layers = {"a": PairChoice(10, 100, ({2: 1.0, 4: 0.5}, {4: 1.0, 8: 0.5}))}
    with pytest.raises(UserError, match="need more bits of weights than the targets allow"):
        allocate_pairs(layers, 19, 10_000)
    with pytest.raises(UserError, match="need more bit operations than the targets allow"):
        allocate_pairs(layers, 20, 799)
    assert allocate_pairs(layers, 20, 800) == {"a": (2, 4)}
    assert allocate_pairs(layers, 40, 1600) == {"a": (2, 8)} or allocate_pairs(layers, 40, 1600) == {"a": (4, 4)}


@pytest.mark.slow
def test_pairs_of_a_hundred_layers():
    draw = random.Random(0)
    layers = {
        str(i): PairChoice(
            draw.randint(1000, 9_000_000),
            draw.randint(1000, 9_000_000),
            tuple({b: draw.random() * 4.0**-b for b in widths} for widths in ((2, 3, 4, 5, 6, 8), (6, 7, 8, 16))),
        )
        for i in range(100)
    }
    bits, operations = 4 * sum(c.weights for c in layers.values()), 32 * sum(c.macs for c in layers.values())
    chosen = allocate_pairs(layers, bits, operations)
    assert 0.999 * bits < sum(layers[n].weights * w for n, (w, _) in chosen.items()) <= bits
    assert 0.999 * operations < sum(layers[n].macs * w * a for n, (w, a) in chosen.items()) <= operations
