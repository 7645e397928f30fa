"""Which configurations continue a run."""

from __future__ import annotations

import pytest

from qdiff.cli.run_config import differences

TWO = {"prompts": ["a", "b"], "calibration_prompts": ["a", "b"], "seed": 1}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"max_images": 3}, {"max_images": 5}),
        ({"num_images": 3}, {"num_images": 3}),
        ({"prompts": ["a"]}, {"prompts": ["a", "b"]}),
        ({"calibration_prompts": ["a"] * 3}, {"calibration_prompts": ["a"]}),
        ({"calibration_prompts": ["a", "b"]}, {"calibration_prompts": ["a", "b"] * 3}),
    ],
)
def test_the_same_or_more(before, now):
    assert differences(before, now, is_calibrated=False) == []


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({"max_images": 5}, {"max_images": 3}, "max_images: 5 there, 3 here"),
        ({"prompts": ["a", "b"]}, {"prompts": ["a"]}, "prompts"),
        ({"prompts": ["a", "b"]}, {"prompts": ["a", "c", "d"]}, "prompts"),
        ({"calibration_prompts": ["a", "b"]}, {"calibration_prompts": ["a", "b", "a"]}, "calibration_prompts"),
        ({"calibration_prompts": ["a", "b"]}, {"calibration_prompts": ["b", "a"]}, "calibration_prompts"),
    ],
)
def test_others_are_named(before, now, named):
    (found,) = differences(before, now, is_calibrated=False)
    assert found.startswith(named)


def test_calibration_prompts_that_are_no_longer_used_may_grow():
    grown = TWO | {"prompts": ["a", "b", "c"], "calibration_prompts": ["a", "b", "c"]}
    assert differences(TWO, grown, is_calibrated=True) == []
    assert len(differences(TWO, grown, is_calibrated=False)) == 1
    assert len(differences(TWO, grown | {"calibration_prompts": ["c"]}, is_calibrated=True)) == 1
