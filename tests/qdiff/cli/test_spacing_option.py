"""``--cali_spacing``: whose timesteps a plan takes."""

from __future__ import annotations

import logging

import pytest
import torch

from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.timesteps import Spacing
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, ignored_options, resolve_ptq
from qdiff.cli.planned_recording import warn_if_ends_early
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


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (("--method", "grip", "--cali_data_path", "file.pt"), True),
        (("--method", "grip", "--cali_data_path", "file.pt", "--cali_spacing", "every"), False),  # asked for
        (("--method", "qdiff", "--cali_data_path", "file.pt"), False),  # the papers' way
        (("--method", "grip"), False),  # recorded by the run itself
    ],
)
def test_a_file_without_the_last_timesteps_is_told(words, warned, caplog):
    data = CalibrationSet((torch.zeros(2, 1, 4, 4), torch.tensor([900, 300])))
    with caplog.at_level(logging.WARNING, "qdiff"):
        warn_if_ends_early(plan(*words), data, [900.0, 600.0, 300.0, 0.0])
    assert ("file.pt ends at timestep 300, but sampling goes on to 0" in caplog.text) == warned
    caplog.clear()
    warn_if_ends_early(plan(*words), data, [900.0, 600.0, 300.0])
    assert not caplog.text
