"""The optimisation loop: it fits, it is fixed by its seed, it uses all data."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qdiff.adaptive_rounding import LearnedRounding
from qdiff.calibration.feeding import Feeding
from qdiff.calibration.objectives import fisher_weights, lp_error, weighted_error
from qdiff.calibration.reconstruction import FitSettings, RoundingRegulariser, Unit, optimise
from qdiff.config import QuantConfig
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.ranges.estimators import RangeMethod

CPU = torch.device("cpu")
# Relative: float32 sums of a few hundred terms in another order.
SUM_TOLERANCE = 1e-5


def make_unit(count=12):
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    x = torch.randn(count, 16) @ torch.randn(16, 16)  # correlated inputs: where rounding to nearest is not best
    target = layer(x).detach()
    module = QuantModule(layer, QuantConfig(3)).requires_grad_(False)
    module.init_weight_ranges(RangeMethod.MIN_MAX)
    return Unit("layer", module, (x,), target, (x,))


def output_error(unit):
    with torch.no_grad(), leaf_modes([unit.module], weights=True, activations=False):
        return float((unit.module(*unit.inputs) - unit.target).square().sum())


def fit(unit, seed=0, iterations=300, batch_size=5, regulariser=RoundingRegulariser()):  # noqa: B008 - frozen
    rounding = LearnedRounding(unit.module)
    optimiser = torch.optim.Adam([rounding.alpha], lr=0.01)
    with rounding, leaf_modes([unit.module], weights=True, activations=False):
        error = optimise(
            unit,
            optimiser,
            lp_error(2.0),
            FitSettings(iterations, batch_size),
            torch.Generator().manual_seed(seed),
            Feeding(CPU),
            penalty=lambda progress: regulariser([rounding], progress),
        )
    alpha = rounding.alpha.detach().clone()
    rounding.harden()
    return alpha, error


@pytest.mark.slow
def test_it_beats_rounding_to_nearest():
    unit = make_unit()
    nearest = output_error(unit)
    fit(unit)
    assert output_error(unit) < 0.8 * nearest


def test_the_seed_fixes_the_result_whatever_the_global_generator():
    first, first_error = fit(make_unit(), seed=1, iterations=20)
    unit = make_unit()
    torch.manual_seed(99)
    again, again_error = fit(unit, seed=1, iterations=20)
    assert torch.equal(first, again) and first_error == again_error
    assert not torch.equal(first, fit(make_unit(), seed=2, iterations=20)[0])


def rows_used(count, batch_size, iterations):
    unit, used = make_unit(count), []

    def objective(output, target, rows):  # the weights of a unit are here the numbers of its samples
        assert torch.equal(target, unit.target[rows])
        used.append(rows)
        return (output - target).square().mean()

    parameter = nn.Parameter(torch.zeros(8))
    module = unit.module
    numbers = torch.arange(count)
    unit = Unit(unit.name, lambda x: module(x) + parameter, unit.inputs, unit.target, unit.float_inputs, numbers)
    optimise(
        unit,
        torch.optim.SGD([parameter], lr=0.0),
        objective,
        FitSettings(iterations, batch_size),
        torch.Generator().manual_seed(0),
        Feeding(CPU),
    )
    return used


def test_the_remainder_of_a_batch_is_used():
    used = rows_used(count=12, batch_size=5, iterations=12)
    assert {len(rows) for rows in used} == {5}
    assert torch.cat(used).bincount(minlength=12).tolist() == [5] * 12
    first_pass = torch.cat(used)[:12]
    assert sorted(first_pass.tolist()) == list(range(12)), "a sample came up twice before all came up once"
    assert first_pass.tolist() != list(range(12)), "not shuffled"


def test_a_batch_larger_than_the_set_is_the_set():
    used = rows_used(count=4, batch_size=32, iterations=3)
    assert [sorted(rows.tolist()) for rows in used] == [[0, 1, 2, 3]] * 3


def test_callbacks_see_every_iteration():
    unit, seen = make_unit(), {"progress": [], "after": 0, "iterations": 0, "rate": []}
    parameter = nn.Parameter(torch.ones(8))
    module = unit.module
    optimiser = torch.optim.SGD([parameter], lr=0.1)

    def penalty(progress):
        seen["progress"].append(progress)
        seen["rate"].append(optimiser.param_groups[0]["lr"])
        return 0.0

    def after_step():
        seen["after"] += 1
        parameter.data.clamp_(min=1.0)

    def on_iteration():
        assert bool((parameter >= 1.0).all()), "after_step comes before the next forward"
        seen["iterations"] += 1

    optimise(
        Unit("", lambda x: module(x) * parameter, unit.inputs, unit.target * 0, unit.float_inputs),
        optimiser,
        lp_error(2.4),
        FitSettings(4, 5, decays=True),
        torch.Generator(),
        Feeding(CPU),
        penalty=penalty,
        after_step=after_step,
        on_iteration=on_iteration,
    )
    assert seen["progress"] == [0.0, 0.25, 0.5, 0.75]
    assert seen["after"] == seen["iterations"] == 4
    assert seen["rate"] == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-4)  # 0.05·(1 + cos πk/4)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_the_penalty_decides_the_roundings():
    undecided = {}
    for regulariser in (RoundingRegulariser(), RoundingRegulariser(weight=0.0)):
        alpha, _ = fit(make_unit(), iterations=600, regulariser=regulariser)
        h = (1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1)
        undecided[regulariser.weight] = float((1 - (2 * h - 1).abs()).mean())
    assert undecided[0.01] < 0.5 * undecided[0.0]


class Recorder:
    def __init__(self):
        self.betas = []

    def regulariser(self, beta):
        self.betas.append(beta)
        return torch.tensor(100.0)


def test_regulariser_warm_up_and_beta():
    regulariser, recorder = RoundingRegulariser(), Recorder()
    assert [regulariser([recorder], p) for p in (0.0, 0.1, 0.1999)] == [0.0] * 3
    assert recorder.betas == []
    for progress in (0.2, 0.6, 0.999999):
        # Every layer counts, a split layer's as much as any other.
        assert float(regulariser([recorder, recorder], progress)) == pytest.approx(0.01 * 200)
    assert recorder.betas[::2] == pytest.approx([20.0, 11.0, 2.0], abs=1e-4)


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5, 5)])
def test_lp_error_sums_channels_and_averages_the_rest(p, shape):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    expected = sum(abs(d) ** p for d in (a - b).flatten().tolist()) / (a.numel() / 4)
    got = float(lp_error(p)(a, b, None))
    assert got == pytest.approx(expected, rel=SUM_TOLERANCE)
    assert got * 1.01 != pytest.approx(expected, rel=SUM_TOLERANCE)


def test_fisher_error_weights_by_squared_gradients_of_the_right_rows():
    gradients = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
    rows = torch.tensor([2, 0])
    output, target = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 2)
    mean_square = (1 + 9 + 4 + 4) / 6
    expected = ((1 * 4 + 4 * 4) + (9 * 1 + 16 * 0)) / mean_square / 2
    found = float(weighted_error(output, target, fisher_weights(gradients)[rows]))
    assert found == pytest.approx(expected, rel=SUM_TOLERANCE)


def test_fisher_error_of_equal_gradients_is_the_squared_error():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 3, 2, generator=generator), torch.randn(4, 3, 2, generator=generator)
    plain = lp_error(2.0)(a, b, None)
    assert float(weighted_error(a, b, fisher_weights(torch.full((4, 3, 2), -7.0)))) == pytest.approx(float(plain))


def test_a_unit_needs_no_more_than_its_fields():
    """`optimise` reads inputs, target, weights and timesteps alone: any object with a callable module will do."""
    parameter = nn.Parameter(torch.zeros(3))
    inputs, target = (torch.zeros(4, 3),), torch.ones(4, 3)
    unit = SimpleNamespace(module=lambda x: x + parameter, inputs=inputs, target=target, weights=None, timesteps=None)
    error = optimise(
        unit,
        torch.optim.SGD([parameter], lr=0.3),
        lp_error(2.0),
        FitSettings(50, 4),
        torch.Generator(),
        Feeding(CPU),
    )
    assert error < 1e-6  # (1 − 2·0.3)^50 is far below
    assert parameter.tolist() == pytest.approx([1, 1, 1], abs=1e-3)
