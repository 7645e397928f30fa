"""The options of GPTQ and of bias correction: what they set, and for which methods."""

from __future__ import annotations

import pytest

from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, ignored_options, resolve_ptq
from qdiff.errors import UserError
from qdiff.methods.gptq import GptqConfig
from qdiff.ranges.estimators import RangeMethod


def parsed(*words):
    parser = Parser(None)
    add_ptq_options(parser)
    return parser.parse_args([str(w) for w in words])


def plan(*words):
    return resolve_ptq(parsed("--ptq", *words), RangeMethod.MSE, RangeMethod.MSE)


def test_the_methods_numbers():
    assert plan("--method", "gptq").recipe == GptqConfig()
    numbers = ("--gptq_factor", 1, "--gptq_damping", 0.1, "--gptq_rows", 9)
    made = plan("--method", "gptq", "--gptq_target", "gptaq", *numbers)
    assert made.recipe == GptqConfig(target="gptaq", factor=1.0, damping=0.1, most_rows=9)
    assert not plan("--method", "gptq", "--no-bias_correction").recipe.bias_correction
    assert made.to_dict()["recipe"]["bias_correction"] == GptqConfig().bias_correction
    assert made.quant.weight_range == RangeMethod.MSE


@pytest.mark.parametrize("method", ["qdiff", "eda-dm", "ptq4dm"])
def test_learned_methods_start_from_it(method):
    made = plan("--method", method, "--weight_start", "gptq", "--bias_correction")
    assert made.recipe.rounds_columns and made.recipe.bias_correction
    assert made.to_dict()["recipe"]["start"] == "gptq"
    before = plan("--method", method).to_dict()["recipe"]
    assert not before.keys() & {"start", "bias_correction"}  # runs from before these entries can be continued


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("qdiff", ("--gptq_target", "plain")),
        ("eda-dm", ("--gptq_rows", "5")),
        ("gptq", ("--weight_start", "gptq")),
        ("linear", ("--weight_start", "gptq")),
        ("linear", ("--bias_correction",)),
    ],
)
def test_options_of_other_methods_are_an_error(method, option):
    with pytest.raises(UserError, match=f"{option[0]} has no meaning with --method {method}") as caught:
        plan("--method", method, *option)
    assert "\n" not in str(caught.value)


def test_without_ptq_they_have_no_effect():
    (sentence,) = ignored_options(parsed("--gptq_damping", 0.1, "--bias_correction"))
    assert "--gptq_damping" in sentence and "--bias_correction" in sentence
