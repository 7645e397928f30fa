"""The options of input scales, and what DMQ's row makes of the others."""

from __future__ import annotations

import pytest

from qdiff.calibration.input_scales import InputScaling, Scaling
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, ignored_options, resolve_ptq
from qdiff.config import ActRanges
from qdiff.errors import UserError
from qdiff.methods.dmq import DmqConfig
from qdiff.ranges.estimators import RangeMethod


def parsed(*words):
    parser = Parser(None)
    add_ptq_options(parser)
    return parser.parse_args([str(w) for w in words])


def plan(*words):
    return resolve_ptq(parsed("--ptq", *words), RangeMethod.MSE, RangeMethod.MSE)


def test_by_default_nothing_is_scaled_and_plans_are_as_before():
    for method in ("linear", "qdiff", "gptq", "eda-dm"):
        made = plan("--method", method)
        assert made.scaling == InputScaling() and "scaling" not in made.to_dict()
        assert made.quant.act_ranges is ActRanges.SHARED


def test_options_set_the_numbers():
    words = ("--scaling", "learned", "--scaling_iters", 7, "--scaling_weighting", 25, "--scaling_start", "dilate")
    made = plan("--method", "gptq", *words, "--cali_batch_size", 8)
    assert made.scaling == InputScaling("learned", "dilate", 7, 8, weighting=25.0)
    assert made.to_dict()["scaling"]["iterations"] == 7
    assert plan("--method", "linear", "--scaling", "search").scaling == InputScaling("search")


def test_dmqs_row():
    made = plan("--method", "dmq", "--quant_act")
    assert isinstance(made.recipe, DmqConfig) and made.scaling == InputScaling(Scaling.LEARNED)
    assert made.quant.act_ranges is ActRanges.TIMESTEP and made.quant.act_range == RangeMethod.AVERAGE
    assert plan("--method", "dmq", "--quant_act", "--act_ranges", "shared").quant.act_ranges is ActRanges.SHARED
    assert plan("--method", "dmq", "--scaling", "none").scaling == InputScaling()
    assert plan("--method", "dmq").quant.act_ranges is ActRanges.SHARED, "activations stay in float"
    assert plan("--method", "dmq", "--quant_act", "--quant_mode", "dynamic").quant.act_ranges is ActRanges.SHARED
    assert plan("--method", "dmq", "--quant_act", "--cali_ckpt", "x", "--resume").scaling == InputScaling()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--scaling_iters", 5), "--scaling_iters needs --scaling learned"),
        (("--scaling", "search", "--scaling_start", "dilate"), "--scaling_start needs --scaling learned"),
        (("--scaling", "learned", "--scaling_iters", 0), "--scaling_iters at least 1"),
        (("--scaling", "learned", "--scaling_weighting", -1), "--scaling_weighting a finite number"),
        (("--scaling", "learned", "--quant_act", "--resume_w", "--cali_ckpt", "x"), "--scaling belongs to calibrating"),
        (("--scaling", "learned", "--resume", "--cali_ckpt", "x"), "--scaling belongs to calibrating"),
    ],
)
def test_contradictions_are_one_sentence(words, names):
    with pytest.raises(UserError, match=names) as caught:
        plan(*words)
    assert "\n" not in str(caught.value)


def test_without_ptq_they_have_no_effect():
    (sentence,) = ignored_options(parsed("--scaling", "search"))
    assert "--scaling has no effect" in sentence
