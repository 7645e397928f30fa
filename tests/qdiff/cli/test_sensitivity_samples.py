"""The calibration samples that sensitivities are measured on."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from qdiff.calibration.samples import CalibrationSet
from qdiff.cli.mixed_precision import spread_samples


def chosen(total, count):
    """Indices of the samples, which are stored by timestep; x and t are of the same ones."""
    rows = torch.arange(total)
    x, t = spread_samples(CalibrationSet((rows.view(-1, 1, 1, 1).float(), rows)), count)
    assert torch.equal(x.flatten().long(), t)
    return t.tolist()


@pytest.mark.parametrize(("total", "count"), [(640, 400), (50, 32), (640, 639), (1000, 128), (7, 2)])
def test_both_ends_are_measured_where_the_count_does_not_divide(total, count):
    found = chosen(total, count)
    assert len(found) == len(set(found)) == count and found == sorted(found)
    assert found[0] == 0 and found[-1] == total - 1
    gaps = {after - before for before, after in pairwise(found)}
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("count", [32, 128])
def test_the_usual_samples_of_a_usual_set_stay(count):
    """Results are recorded with them: 32 for `sqnr` and 128 for `probe`, of 20 steps with 32 samples each."""
    assert chosen(640, count) == list(range(0, 640, 640 // count))


def test_all_samples_of_a_small_set():
    assert chosen(20, 32) == list(range(20))
