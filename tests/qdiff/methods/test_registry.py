"""Methods are found by name, have one signature, and a new one is a row."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from types import MappingProxyType

import pytest

from qdiff.calibration.run import CalibrationRun, assert_all_fired, init_weights
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, resolve_ptq
from qdiff.errors import UserError
from qdiff.methods import registry
from qdiff.methods.registry import DEFAULT, METHODS, Method, find_method
from qdiff.ranges.estimators import RangeMethod


@pytest.mark.parametrize("name", METHODS)
def test_rows(name):
    method = find_method(name)
    assert method.name == name and method.title
    assert list(inspect.signature(method.calibrate).parameters) == ["qnn", "data", "config", "run"]
    assert set(method.options.values()) <= ({f.name for f in fields(method.config)} if method.learns else set())
    parser = Parser(None)
    add_ptq_options(parser)
    known = {action.dest for action in parser._actions}
    assert set(method.options) <= known
    plan = resolve_ptq(parser.parse_args(["--ptq", "--method", name]), RangeMethod.MSE, RangeMethod.MSE)
    assert plan.method == name and type(plan.recipe) is (method.config or type(None))


def test_an_unknown_method_is_an_error():
    assert DEFAULT in METHODS
    with pytest.raises(UserError, match=r"the method is 'none'; choose one of linear, qdiff, "):
        find_method("none")


def test_a_new_method_is_a_row(monkeypatch, wrap, data):
    @dataclass(frozen=True)
    class Config:
        iterations: int = 7

    def calibrate(qnn, data, config, run):
        init_weights(qnn)
        run.errors["iterations"] = float(config.iterations)
        assert_all_fired(qnn, data)

    row = Method("mine", "Mine", calibrate, Config, {"cali_iters": "iterations"})
    monkeypatch.setattr(registry, "METHODS", MappingProxyType({**METHODS, "mine": row}))
    monkeypatch.setattr("qdiff.cli.options.ptq.METHODS", registry.METHODS)
    parser = Parser(None)
    add_ptq_options(parser)
    args = parser.parse_args(["--ptq", "--method", "mine", "--weight_bit", "4", "--cali_iters", "9"])
    plan = resolve_ptq(args, RangeMethod.MIN_MAX, RangeMethod.MIN_MAX)
    run = CalibrationRun(show_progress=False)
    find_method(plan.method).calibrate(wrap(weight_bits=4), data, plan.recipe, run)
    assert run.errors == {"iterations": 9.0}
