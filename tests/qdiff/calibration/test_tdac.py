"""How many samples each step gives: TDAC against published values, against its definition, and at its edges."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from golden_cases import GOLDEN

from qdiff.calibration import tdac as allocation
from qdiff.calibration.tdac import counts_from_weights, normalised, repaired, tdac
from qdiff.calibration.timesteps import normal_counts, uniform_counts
from qdiff.errors import UserError
from qdiff.report.allocation_plot import allocation_picture

# Relative L2: the published values were summed in float32.
GOLDEN_TOLERANCE = 1e-6
# Relative: two ways to sum the same float64 numbers.
SUM_TOLERANCE = 1e-10
CASES = ("r0.3_lamda1.0_n64", "r1.0_lamda1.2_n256")


@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN / "eda_dm" / "golden.pth", weights_only=True)["tdac"]


def arguments(case):
    return [kind(v) for kind, v in zip((float, float, int), re.findall(r"[\d.]+", case), strict=True)]


def relative(out, expected):
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def by_definition(features, radius, itself=0, dim=1, reduce=torch.mean):
    """D and V, a pair of steps at a time; the arguments plant errors."""
    features = [f.double() for f in features]
    density, variety = [], []
    for i, a in enumerate(features):
        others = [b for j, b in enumerate(features) if j != i]
        density.append(itself + sum(float(reduce((a - b).square())) <= radius for b in others))
        variety.append(sum(float((1 - F.cosine_similarity(a, b, dim=dim)).sum()) for b in others))
    return torch.tensor(density, dtype=torch.float64), torch.tensor(variety, dtype=torch.float64)


def moving_features(steps=9, images=5, shape=(6, 3, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    start, end = torch.randn(2, images, *shape, generator=generator)
    return torch.stack([start + (end - start) * (i / steps) ** 2 for i in range(steps)])


@pytest.mark.parametrize("case", CASES)
def test_published_allocations(golden, case):
    made, expected = tdac(golden["features"], *arguments(case)), golden[case]
    assert torch.equal(made.density, expected["density"].double())
    assert relative(made.variety, expected["variety"]) < GOLDEN_TOLERANCE
    assert relative(made.weight, expected["weight"]) < GOLDEN_TOLERANCE
    assert torch.equal(made.counts, expected["count"])


@pytest.mark.parametrize("case", CASES)
def test_published_allocations_see_planted_errors(golden, case):
    radius, lamda, count = arguments(case)
    features, expected = golden["features"], golden[case]
    for wrong in ({"itself": 1}, {"reduce": torch.sum}):
        assert not torch.equal(by_definition(features, radius, **wrong)[0], expected["density"].double()), wrong
    for dim in (0, 2):
        assert relative(by_definition(features, radius, dim=dim)[1], expected["variety"]) > 100 * GOLDEN_TOLERANCE
    assert relative(tdac(features, radius, 1.001 * lamda, count).weight, expected["weight"]) > 100 * GOLDEN_TOLERANCE
    assert not torch.equal(tdac(features, radius, 2 * lamda, count).counts, expected["count"])


def test_the_published_shortfall_goes_to_the_largest(golden):
    """The one golden case that needs a repair: 64 samples, of which rounding gives 61."""
    expected = golden[CASES[0]]
    weight = expected["weight"].double()
    rounded = (64 * weight / weight.sum()).round().long()
    assert int(rounded.sum()) == 61
    assert torch.equal(repaired(rounded, weight, 64), expected["count"])
    in_order = rounded.clone()
    in_order[:3] += 1
    assert not torch.equal(in_order, expected["count"])


@pytest.mark.parametrize("chunk", [1, 100, allocation.CHUNK_ELEMENTS])
@pytest.mark.parametrize("shape", [(6, 3, 2), (6,), (1, 4, 4), (6, 7)])
def test_gram_matrices_give_what_the_definition_says(chunk, shape, monkeypatch):
    monkeypatch.setattr(allocation, "CHUNK_ELEMENTS", chunk)
    features = moving_features(shape=shape)
    density, variety = by_definition(features, 0.4)
    made = tdac(features, 0.4, 1.3, 100)
    assert 0 < density.min() < density.max()  # the radius tells the steps apart
    assert torch.equal(made.density, density)
    if shape[0] > 1:
        assert relative(made.variety, variety) < SUM_TOLERANCE
        assert relative(made.weight, normalised(density) + 1.3 * normalised(variety)) < SUM_TOLERANCE
        assert relative(made.variety * 1.0001, variety) > SUM_TOLERANCE


def test_any_float_dtype_layout_and_a_list_will_do():
    features = moving_features().half()
    expected = tdac(features, 0.4, 1.0, 64)
    channels_last = [f.contiguous(memory_format=torch.channels_last) for f in features]
    for same in (list(features), features.float(), features.double(), channels_last, features.float().requires_grad_()):
        made = tdac(same, 0.4, 1.0, 64)
        assert torch.equal(made.counts, expected.counts) and torch.equal(made.density, expected.density)
        assert relative(made.variety, expected.variety) < SUM_TOLERANCE
        assert not made.weight.requires_grad


def test_small_differences_of_large_features_are_seen():
    """In float32 the scalar products would swallow them."""
    generator = torch.Generator().manual_seed(0)
    features = 30 + moving_features() * 1e-3 + torch.randn(1, 5, 6, 3, 2, generator=generator)
    density, variety = by_definition(features, 4e-7)
    made = tdac(features, 4e-7, 1.0, 64)
    assert 0 < density.min() < density.max() and torch.equal(made.density, density)
    assert relative(made.variety, variety) < 1e-4


def test_zero_vectors_have_no_direction():
    features = moving_features()
    features[0] = 0
    assert relative(tdac(features, 0.4, 1.0, 64).variety, by_definition(features, 0.4)[1]) < SUM_TOLERANCE


def test_counts_follow_density_and_variety():
    """Eight steps alike and one apart: density alone starves it, variety alone gives it everything."""
    features = torch.ones(9, 2, 4, 3, 3)
    features[4, :, :2] = -1
    assert tdac(features, 0.5, 0.0, 80).counts.tolist() == [10, 10, 10, 10, 0, 10, 10, 10, 10]
    wanted = tdac(features, 0.5, 1.0, 90)
    assert wanted.weight.tolist() == pytest.approx([1.0] * 9)
    assert wanted.counts.tolist() == [10] * 9
    assert tdac(features, 1e6, 1.0, 80).counts.tolist() == [0, 0, 0, 0, 80, 0, 0, 0, 0]


@pytest.mark.parametrize("count", [1, 3, 7, 64])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_equal_steps_get_equal_counts(steps, count):
    """Density and variety are all equal, the published 0/0: also where sums round differently."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 3, 50, 4, 4, generator=generator).expand(steps, -1, -1, -1, -1)
    made = tdac(features, 0.3, 1.2, count)
    assert made.weight.tolist() == [0.0] * steps
    assert torch.equal(made.counts, uniform_counts(steps, count))


def test_one_measure_may_be_all_equal():
    features = moving_features()
    density, variety = by_definition(features, 0.4)
    assert torch.equal(tdac(features, 1e6, 1.0, 64).density, torch.full((9,), 8.0).double())
    assert relative(tdac(features, 1e6, 1.0, 64).weight, normalised(variety)) < SUM_TOLERANCE
    lengths = features[:1] * (1 + torch.arange(9.0))[:, None, None, None, None]  # one direction, so no variety
    made = tdac(lengths, 5.0, 7.0, 64)
    assert 0 < made.density.max() > made.density.min()
    assert torch.equal(made.weight, normalised(made.density))
    assert torch.equal(normalised(density * 0 + 3), torch.zeros(9).double())


@pytest.mark.parametrize("count", [1, 2, 5, 8, 1000, 1024])
def test_counts_always_sum_to_what_was_asked_for(count):
    generator = torch.Generator().manual_seed(count)
    for steps in (1, 2, 3, 10, 100):
        for weight in (torch.rand(steps, generator=generator), torch.ones(steps), torch.eye(steps)[0]):
            counts = counts_from_weights(weight, count)
            assert counts.dtype == torch.int64 and counts.shape == (steps,)
            assert int(counts.sum()) == count and int(counts.min()) >= 0
            assert bool((counts[weight == 0] == 0).all())
            assert float((counts - count * weight.double() / weight.double().sum()).abs().max()) < 1.5 + 1e-9


def test_an_excess_is_taken_from_the_last_steps():
    # Shares 2.6, 2.6, 2.6, 0.2: rounded 3, 3, 3, 0 = 9 of 8; the last step has nothing to give.
    assert counts_from_weights(torch.tensor([13.0, 13.0, 13.0, 1.0]), 8).tolist() == [3, 3, 2, 0]
    # Shares 0.6 five times: rounded to 5 of 3.
    assert counts_from_weights(torch.ones(5), 3).tolist() == [1, 1, 1, 0, 0]


def test_a_shortfall_goes_to_the_largest_weights():
    # Shares 1.3, 3.45, 2.25: rounded 1, 3, 2 = 6 of 7.
    assert counts_from_weights(torch.tensor([1.3, 3.45, 2.25]), 7).tolist() == [1, 4, 2]
    # Shares 1.25 four times, and equal weights count in sampling order.
    assert counts_from_weights(torch.ones(4), 5).tolist() == [2, 1, 1, 1]


def test_repairs_beyond_one_pass():
    weight = torch.tensor([1.0, 3.0, 2.0])
    assert repaired(torch.tensor([4, 1, 3]), weight, 2).tolist() == [2, 0, 0]
    assert repaired(torch.tensor([4, 1, 3]), weight, 0).tolist() == [0, 0, 0]
    assert repaired(torch.tensor([0, 0, 0]), weight, 8).tolist() == [2, 3, 3]
    given = torch.tensor([4, 1, 3])
    repaired(given, weight, 2)
    assert given.tolist() == [4, 1, 3], "the caller's tensor was changed"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"count": 0}, "samples is 0; give at least 1"),
        ({"count": -3}, "at least 1"),
        ({"radius": 0.0}, "--tdac_radius is 0.0"),
        ({"radius": math.nan}, "--tdac_radius"),
        ({"lamda": -0.1}, "--lamda is -0.1"),
        ({"lamda": math.inf}, "--lamda"),
        ({"features": torch.full((3, 2, 4, 1, 1), math.inf)}, "not finite"),
    ],
)
def test_bad_numbers_are_one_clear_error(change, match):
    with pytest.raises(UserError, match=match):
        tdac(**{"features": moving_features(), "radius": 0.4, "lamda": 1.0, "count": 8, **change})


@pytest.mark.parametrize("features", [[], torch.zeros(0, 2, 4, 1), torch.zeros(3, 0, 4, 1), torch.zeros(3, 2)])
def test_features_of_no_step_or_image_are_refused(features):
    with pytest.raises(ValueError, match="T tensors of one shape"):
        tdac(features, 0.4, 1.0, 8)


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [(4, 8, [2, 2, 2, 2]), (4, 10, [2, 3, 2, 3]), (4, 2, [0, 1, 0, 1]), (1, 5, [5]), (5, 1, [0, 0, 0, 0, 1])],
)
def test_uniform_counts(steps, count, expected):
    assert uniform_counts(steps, count).tolist() == expected


def normal(steps, count, seed=0):
    return normal_counts(steps, count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("steps", [1, 2, 20, 100])
@pytest.mark.parametrize("count", [1, 2, 64, 1024])
def test_normal_counts_sum_and_span_the_range(steps, count):
    counts = normal(steps, count)
    assert counts.shape == (steps,) and counts.dtype == torch.int64
    assert int(counts.sum()) == count and int(counts.min()) >= 0
    if count > 1:
        assert counts[0] >= 1 and counts[-1] >= 1, "the two extremes that were drawn"
    assert torch.equal(counts, normal(steps, count))
    if steps > 2 and count > 2:
        assert not torch.equal(counts, normal(steps, count, seed=1))


def test_normal_counts_are_the_drawn_timesteps_from_the_clean_end(monkeypatch):
    """Draws 0, 1, 1, 4 of a standard normal, in 5 steps: timesteps 0, 1, 1, 4 from the CLEAN end."""
    monkeypatch.setattr(torch, "randn", lambda *_, dtype, **__: torch.tensor([0.0, 1, 1, 4], dtype=dtype))
    assert normal_counts(5, 4, torch.Generator()).tolist() == [1, 0, 0, 2, 1]


def test_normal_counts_are_a_bell():
    counts = normal(20, 100_000).double()
    places = torch.arange(20).double()
    mean = float((counts * places).sum() / counts.sum())
    deviation = float((counts * (places - mean) ** 2).sum() / counts.sum()) ** 0.5
    # 100,000 normal draws span about ±4.3 deviations, so one of them is 19/8.6 steps.
    assert mean == pytest.approx(9.5, abs=1.0) and deviation == pytest.approx(2.2, abs=0.35)
    assert counts[int(mean)] > 5 * counts[2] > 0


def test_a_single_normal_draw_keeps_its_timestep():
    """One value has no range; over seeds it is where the distribution has it, 0.4·T from the clean end."""
    places = torch.tensor([int(normal(100, 1, seed).argmax()) for seed in range(300)]).double()
    assert float(places.median()) == pytest.approx(59, abs=8)


@pytest.mark.parametrize("schedule", [uniform_counts, normal])
def test_schedules_of_no_samples_are_refused(schedule):
    with pytest.raises(UserError, match="samples is 0"):
        schedule(5, 0)
    with pytest.raises(ValueError, match="0 steps"):
        schedule(0, 5)


@pytest.mark.parametrize("steps", [1, 9])
def test_the_picture_appears_whole(tmp_path, steps):
    made = tdac(moving_features(steps), 0.4, 1.0, 64)
    allocation_picture(made, tmp_path / "new" / "allocation.png", range(steps))
    [path] = (tmp_path / "new").iterdir()
    assert path.name == "allocation.png" and path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="10 timesteps"):
        allocation_picture(made, tmp_path / "other.png", range(10))
    assert not (tmp_path / "other.png").exists()
