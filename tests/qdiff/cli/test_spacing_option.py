"""``--cali_spacing``: whose timesteps a plan takes."""

from __future__ import annotations

import logging

import pytest
import torch

from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.timesteps import Spacing
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, ignored_options, resolve_ptq
from qdiff.cli.planned_recording import check_to_be_recorded, warn_if_ends_early
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


@pytest.mark.parametrize(("method", "warned"), [("tfmq-dm", True), ("qdiff", False)])
def test_a_last_step_without_a_range_of_its_own_is_told(method, warned, caplog):
    """PLMS calls the network once more than it has steps, so 20 of 20 steps leave out the last call."""
    data = CalibrationSet((torch.zeros(2, 1, 4, 4), torch.tensor([900, 300])))
    with caplog.at_level(logging.WARNING, "qdiff"):
        warn_if_ends_early(plan("--method", method, "--quant_act"), data, [900.0, 600.0, 300.0, 0.0])
    assert ("down to 0 takes the ranges of that timestep; --cali_spacing ends" in caplog.text) == warned


class Sampling:
    """A sampler and its pipeline in one: 25 steps, of which the papers' rule takes the first 20."""

    def __init__(self, visited):
        self.times, self.calls, self.sampler = visited, 25, self

    def visited(self):
        return self.times


def test_ranges_that_would_not_reach_the_last_step_are_refused_before_recording():
    words = ("--method", "tfmq-dm", "--quant_act", "--cali_st")
    known = Sampling([float(t) for t in range(961, 0, -40)])
    with pytest.raises(UserError, match=r"20 timesteps from 201 to 961; .*--cali_spacing ends") as error:
        check_to_be_recorded(plan(*words, 20), known)
    assert "\n" not in str(error.value)
    check_to_be_recorded(plan(*words, 20, "--cali_spacing", "ends"), known)
    check_to_be_recorded(plan(*words, 25), known)
    check_to_be_recorded(plan("--method", "qdiff", "--cali_st", 20), known)
    check_to_be_recorded(plan(*words, 20), Sampling([]))  # not known before the run
    with pytest.raises(UserError, match="26 calibration steps"):
        check_to_be_recorded(plan(*words, 26), known)
