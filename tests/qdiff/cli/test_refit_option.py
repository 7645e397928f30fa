"""``--refit``: what it adds to a plan, what it contradicts, and how its time counts."""

from __future__ import annotations

import json

import pytest

from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, ignored_options, resolve_ptq
from qdiff.cli.run_manifest import Manifest
from qdiff.errors import UserError
from qdiff.methods.registry import METHODS
from qdiff.ranges.estimators import RangeMethod


def parsed(*words):
    parser = Parser(None)
    add_ptq_options(parser)
    return parser.parse_args([str(w) for w in words])


def plan(*words):
    return resolve_ptq(parsed("--ptq", *words), RangeMethod.MIN_MAX, RangeMethod.MIN_MAX)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_it(method):
    before, made = plan("--method", method), plan("--method", method, "--refit", 2)
    assert (before.refit, made.refit) == (0, 2)
    assert "refit" not in before.to_dict()  # so that runs from before can be continued
    assert json.loads(json.dumps(made.to_dict())) == {**json.loads(json.dumps(before.to_dict())), "refit": 2}


def test_it_records_beside_a_given_set(tmp_path):
    given = ("--cali_data_path", tmp_path / "data.pt")
    assert plan().records and not plan(*given).records
    assert plan(*given, "--refit", 1).records
    assert not plan("--cali_ckpt", tmp_path / "q.safetensors").records


@pytest.mark.parametrize("more", [(), ("--resume",), ("--resume_w", "--quant_act")])
def test_a_checkpoint_is_not_fitted_again(more):
    with pytest.raises(UserError, match="--refit belongs to calibrating, and --cali_ckpt names") as e:
        plan("--cali_ckpt", "q.safetensors", *more, "--refit", 1)
    assert "\n" not in str(e.value)


def test_numbers_and_runs_without_it():
    with pytest.raises(UserError, match="--refit is -1"):
        plan("--refit", -1)
    assert "--refit has no effect" in ignored_options(parsed("--refit", 1))[0]


@pytest.mark.parametrize(
    ("seconds", "cpu", "wanted"),
    [
        ({}, None, (0.0, None)),
        ({"recording": 9.0, "calibration": 2.0}, {"recording": 9.0, "calibration": 1.5}, (2.0, 1.5)),
        ({"calibration": 2.0}, None, (2.0, None)),  # of a run before there were CPU seconds
        (
            {"recording": 9.0, "calibration": 2.0, "refit recording": 4.0},
            {"recording": 9.0, "calibration": 1.5, "refit recording": 3.0},
            (6.0, 4.5),
        ),
    ],
)
def test_recordings_of_refits_count_as_calibration(seconds, cpu, wanted):
    assert Manifest({}, seconds=seconds, cpu_seconds=cpu).calibration_seconds() == wanted
