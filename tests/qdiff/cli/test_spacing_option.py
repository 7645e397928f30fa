"""``--cali_spacing``: whose timesteps a plan takes."""

from __future__ import annotations

import pytest

from qdiff.calibration.timesteps import Spacing
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, ignored_options, resolve_ptq
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


def test_where_nothing_is_recorded_it_is_nothing(tmp_path):
    loaded = ("--method", "grip", "--cali_ckpt", tmp_path / "q.safetensors")
    assert "spacing" not in plan(*loaded).to_dict()
    parser = Parser(None)
    add_ptq_options(parser)
    assert "--cali_spacing has no effect" in ignored_options(parser.parse_args(["--cali_spacing", "ends"]))[0]


@pytest.mark.parametrize("method", PAPERS)
def test_any_method_that_draws_nothing_may(method):
    words = ("--method", method, "--cali_spacing", "ends")
    if METHODS[method].draws is None:
        assert plan(*words).spacing is Spacing.ENDS
        return
    with pytest.raises(UserError, match=f"--cali_spacing has no meaning with --method {method}") as error:
        plan(*words)
    assert "\n" not in str(error.value)
