"""The options of TFMQ-DM and of the temporal unit: what they set, and for which methods."""

from __future__ import annotations

import pytest

from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, ignored_options, resolve_ptq
from qdiff.config import ActRanges
from qdiff.errors import UserError
from qdiff.methods.tfmq_dm import TfmqDmConfig
from qdiff.ranges.estimators import RangeMethod


def parsed(*words):
    parser = Parser(None)
    add_ptq_options(parser)
    return parser.parse_args([str(w) for w in words])


def plan(*words):
    return resolve_ptq(parsed("--ptq", *words), RangeMethod.MIN_MAX, RangeMethod.MIN_MAX)


def test_the_methods_numbers():
    made = plan("--method", "tfmq-dm", "--quant_act", "--tfmq_every", 5)
    assert made.recipe == TfmqDmConfig(every=5)
    assert (made.recipe.iterations, made.recipe.batch_size, made.recipe.temporal_unit) == (20_000, 32, True)
    quant = made.quant
    assert (quant.weight_range, quant.act_range, quant.act_ranges) == ("mse", "ema", ActRanges.TIMESTEP)
    assert made.to_dict()["recipe"]["temporal_unit"] is True
    changed = plan("--method", "tfmq-dm", "--quant_act", "--act_ranges", "shared", "--a_range", "mse")
    assert (changed.quant.act_range, changed.quant.act_ranges) == ("mse", ActRanges.SHARED)


def test_where_ranges_are_not_calibrated_there_are_none_per_timestep():
    assert plan("--method", "tfmq-dm").quant.act_ranges is ActRanges.SHARED
    for words in (("--quant_mode", "dynamic"), ("--modulate",)):
        assert plan("--method", "tfmq-dm", "--quant_act", *words).quant.act_ranges is ActRanges.SHARED


@pytest.mark.parametrize("method", ["qdiff", "eda-dm", "ptq4dm", "gptq"])
def test_the_temporal_unit_of_other_methods(method):
    assert plan("--method", method, "--temporal_unit").recipe.temporal_unit
    before = plan("--method", method)
    assert not before.recipe.temporal_unit
    assert "temporal_unit" not in before.to_dict()["recipe"]  # runs from before this entry can be continued
    assert before.quant.act_ranges is ActRanges.SHARED


@pytest.mark.parametrize(
    ("method", "option"),
    [("linear", ("--temporal_unit",)), ("qdiff", ("--tfmq_every", 2)), ("gptq", ("--tfmq_every", 2))],
)
def test_options_of_other_methods_are_an_error(method, option):
    with pytest.raises(UserError, match=f"{option[0]} has no meaning with --method {method}") as caught:
        plan("--method", method, *option)
    assert "\n" not in str(caught.value)


def test_without_ptq_they_have_no_effect():
    (sentence,) = ignored_options(parsed("--temporal_unit", "--tfmq_every", 2))
    assert "--temporal_unit" in sentence and "--tfmq_every" in sentence
