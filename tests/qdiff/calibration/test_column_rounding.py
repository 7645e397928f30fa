"""Column by column rounding against slow implementations of the papers' formulas, all in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from qdiff.calibration import column_rounding
from qdiff.calibration.column_rounding import (
    FACTORS,
    Grid,
    NotPositiveDefinite,
    Target,
    corrected_weight,
    inverse_factors,
    round_matrix,
)
from qdiff.functional import quantize
from qdiff.ranges.estimators import estimate

BITS, ROWS, COLUMNS = 4, 6, 24
EXACT = 1e-9  # relative, in float64


def case(seed, columns=COLUMNS, bits=BITS):
    """Return a weight, its grid, and moments of correlated inputs and of their errors."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(400, columns, generator=generator, dtype=torch.float64) @ mixing
    noise = torch.randn(400, columns, generator=generator, dtype=torch.float64)
    quantized = 0.95 * x + 0.3 * noise @ mixing.flip(0)
    delta, zero_point = estimate(weight, bits, "max", False, per_channel=True)
    inputs, cross = 2 * quantized.T @ quantized / 400, 2 * (x - quantized).T @ quantized / 400
    return weight, Grid(delta.double().expand_as(weight), zero_point.expand_as(weight), bits), inputs, cross


def nearest(weight, grid):
    return quantize(weight, grid.delta, grid.zero_point, grid.bits)


def values(integers, grid):
    return grid.delta * (integers - grid.zero_point)


def damped(inputs, damping=0.01):
    return inputs + damping * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=inputs.dtype)


def slow(weight, grid, inputs, cross, factor):
    """OBQ's update, and GPTAQ's, with the inverse of the remaining submatrix computed anew at every column."""
    weight, integers = weight.clone(), torch.zeros_like(weight)
    order = inputs.diagonal().argsort(descending=True).tolist()
    inputs = damped(inputs)
    for place, j in enumerate(order):
        left, after = order[place:], order[place + 1 :]
        inverse = torch.linalg.inv(inputs[left][:, left])
        before = weight[:, j].clone()
        integers[:, j] = quantize(before, grid.delta[:, j], grid.zero_point[:, j], grid.bits)
        error = (before - values(integers, grid)[:, j]) / inverse[0, 0]
        weight[:, left] -= torch.outer(error, inverse[0])
        if after and factor:
            weight[:, after] += factor * torch.outer(
                before, cross[j, after] @ torch.linalg.inv(inputs[after][:, after])
            )
    return integers


@pytest.mark.parametrize("target", [Target.PLAIN, Target.GPTAQ])
@pytest.mark.parametrize("seed", range(4))
def test_the_result_is_that_of_the_slow_formula(target, seed):
    weight, grid, inputs, cross = case(seed)
    for factor in (FACTORS[target], 1.0) if target is Target.GPTAQ else (None,):
        found = round_matrix(weight, grid, inputs, cross, target=target, factor=factor)
        assert torch.equal(found, slow(weight, grid, inputs, cross, factor or 0))
        assert not torch.equal(found, slow(weight, grid, inputs, cross, (factor or 0) + 0.5))
        assert not torch.equal(found, nearest(weight, grid))


@pytest.mark.parametrize("seed", range(4))
def test_the_corrected_target_is_plain_gptq_on_another_weight(seed):
    weight, grid, inputs, cross = case(seed)
    found = round_matrix(weight, grid, inputs, cross, target=Target.CORRECTED)
    moved = weight + weight @ cross @ torch.linalg.inv(damped(inputs))
    assert torch.equal(found, slow(moved, grid, inputs, cross, 0))
    assert not torch.equal(found, slow(weight, grid, inputs, cross, 0))


def test_the_corrected_weight_leaves_no_error_that_the_input_explains():
    """E(Wx − Vx̂)x̂ᵀ = 0, which no other V has."""
    weight, _, inputs, cross = case(0)
    (upper,) = inverse_factors([inputs], [torch.zeros((), dtype=torch.float64)])
    found = corrected_weight(weight, cross, upper)
    residual = weight @ (cross + inputs) - found @ inputs
    assert residual.norm() < EXACT * (weight @ inputs).norm()
    assert (residual + 1e-8 * found @ inputs).norm() > EXACT * (weight @ inputs).norm()


@pytest.mark.parametrize("target", Target)
def test_blocks_of_any_size_give_the_same(target):
    weight, grid, inputs, cross = case(1, columns=40)
    whole, *others = (
        round_matrix(weight, grid, inputs, cross, target=target, block=block) for block in (128, 1, 7, 40)
    )
    assert all(torch.equal(whole, other) for other in others)


@pytest.mark.parametrize("target", [Target.GPTAQ, Target.CORRECTED])
def test_equal_inputs_make_it_plain(target):
    weight, grid, inputs, cross = case(2)
    plain = round_matrix(weight, grid, inputs)
    assert torch.equal(round_matrix(weight, grid, inputs, torch.zeros_like(cross), target=target), plain)
    assert torch.equal(round_matrix(weight, grid, inputs, cross, target=target, factor=0.0), plain)
    assert not torch.equal(round_matrix(weight, grid, inputs, cross, target=target), plain)


def test_uncorrelated_inputs_round_to_nearest():
    weight, grid, inputs, _ = case(3)
    diagonal = torch.diag(torch.arange(1.0, COLUMNS + 1, dtype=torch.float64))
    for alone in (torch.eye(COLUMNS, dtype=torch.float64), diagonal):
        assert torch.equal(round_matrix(weight, grid, alone), nearest(weight, grid))
    assert not torch.equal(round_matrix(weight, grid, inputs), nearest(weight, grid))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_error_of_the_output_falls(bits):
    def error(integers):
        difference = weight - values(integers, grid)
        return float(torch.einsum("rk,kl,rl->", difference, inputs, difference))

    for seed in range(5):
        weight, grid, inputs, _ = case(seed, bits=bits)
        assert error(round_matrix(weight, grid, inputs)) < 0.8 * error(nearest(weight, grid))


def test_each_target_has_the_least_error_of_its_own_kind():
    """Against the float output, with the inputs' errors: nearest > GPTQ > GPTAQ > corrected, on average of cases."""

    def error(integers):
        difference = weight - values(integers, grid)
        # E|Wx − Vx̂|² without the part that no V changes.
        return float(
            torch.einsum("rk,kl,rl->", difference, inputs, difference)
            + 2 * torch.einsum("rk,kl,rl->", weight, cross, difference)
        )

    sums = torch.zeros(4, dtype=torch.float64)
    for seed in range(12):
        weight, grid, inputs, cross = case(seed)
        rounded = [
            round_matrix(weight, grid, inputs, cross, target=target, factor=1.0)
            for target in (Target.PLAIN, Target.GPTAQ, Target.CORRECTED)
        ]
        sums += torch.tensor([error(q) for q in (nearest(weight, grid), *rounded)])
    assert all(a > b for a, b in pairwise(sums.tolist()))


def test_columns_without_an_input_count_as_zero():
    weight, grid, inputs, cross = case(4)
    dead = torch.tensor([3, 17])
    alive = [k for k in range(COLUMNS) if k not in dead]
    inputs[dead], inputs[:, dead], cross[:, dead] = 0.0, 0.0, 0.0
    for target in (Target.PLAIN, Target.CORRECTED):
        found = round_matrix(weight, grid, inputs, cross, target=target)
        assert torch.equal(found[:, dead], grid.zero_point[:, dead].double())
    rest = Grid(grid.delta[:, alive], grid.zero_point[:, alive], BITS)
    expected = round_matrix(weight[:, alive], rest, inputs[alive][:, alive])
    assert torch.equal(round_matrix(weight, grid, inputs)[:, alive], expected)
    nothing = torch.zeros_like(inputs)
    assert torch.equal(round_matrix(weight, grid, nothing), grid.zero_point.double())


def test_slices_have_their_own_steps_and_share_the_error():
    weight, grid, inputs, _ = case(5)
    coarse = Grid(torch.cat([grid.delta[:, :10], 2 * grid.delta[:, 10:]], 1), grid.zero_point.clone(), BITS)
    found = round_matrix(weight, coarse, inputs)
    assert torch.equal(found, slow(weight, coarse, inputs, None, 0))
    # Errors cross the boundary: each slice by itself gives other integers.
    alone = [
        round_matrix(weight[:, s], Grid(coarse.delta[:, s], coarse.zero_point[:, s], BITS), inputs[s, s])
        for s in (slice(0, 10), slice(10, COLUMNS))
    ]
    assert not torch.equal(found, torch.cat(alone, dim=1))


def test_more_damping_where_there_is_no_factor(monkeypatch):
    weight, grid, inputs, _ = case(6)
    few = inputs[:, :3] @ inputs[:3]
    few = few @ few.T  # of rank 3
    found = round_matrix(weight, grid, few, damping=1e-18)
    assert bool(((found >= 0) & (found <= 15)).all())
    with pytest.raises(NotPositiveDefinite, match="24 columns"):
        inverse_factors([-1e9 * inputs], [torch.ones((), dtype=torch.float64)])
    monkeypatch.setattr(column_rounding, "TRIES", 1)
    with pytest.raises(NotPositiveDefinite):
        round_matrix(weight, grid, few, damping=1e-18)


def test_no_more_damping_is_worked_out_than_is_tried(monkeypatch):
    """Of six tries, five have more damping than asked for, each ten times that of the one before."""
    tried, raised = [], []
    attempt, more = column_rounding._try_factor, column_rounding._raised
    monkeypatch.setattr(column_rounding, "_try_factor", lambda m, d: tried.append(float(d)) or attempt(m, d))
    monkeypatch.setattr(column_rounding, "_raised", lambda *given: raised.append(float(more(*given))) or more(*given))
    negative, one = -1e9 * torch.eye(3, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    with pytest.raises(NotPositiveDefinite):
        inverse_factors([negative], [one])
    assert tried == [10.0**n for n in range(6)] and raised == tried[1:]
