"""``--cali_spacing``: whose timesteps a plan takes."""

from __future__ import annotations

import pytest

from qdiff.calibration.timesteps import Spacing
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, resolve_ptq
from qdiff.errors import UserError
from qdiff.methods.registry import METHODS
from qdiff.ranges.estimators import RangeMethod

PAPERS = [name for name in METHODS if name != "grip"]


def plan(*words):
    parser = Parser(None)
    add_ptq_options(parser)
    args = parser.parse_args([str(word) for word in ("--ptq", *words)])
    return resolve_ptq(args, RangeMethod.MIN_MAX, RangeMethod.MIN_MAX)


def test_papers_methods_keep_the_papers_timesteps():
    for method in PAPERS:
        made = plan("--method", method)
        assert made.spacing is Spacing.EVERY
        assert "spacing" not in made.to_dict()  # so that runs from before can be continued


def test_grip_takes_both_ends():
    assert plan("--method", "grip").spacing is Spacing.ENDS
    assert plan("--method", "grip").to_dict()["spacing"] == "ends"
    assert plan("--method", "grip", "--cali_spacing", "every").spacing is Spacing.EVERY


@pytest.mark.parametrize("method", PAPERS)
def test_any_method_that_draws_nothing_may(method):
    words = ("--method", method, "--cali_spacing", "ends")
    if METHODS[method].draws is None:
        assert plan(*words).spacing is Spacing.ENDS
        return
    with pytest.raises(UserError, match=f"--cali_spacing has no meaning with --method {method}") as error:
        plan(*words)
    assert "\n" not in str(error.value)
