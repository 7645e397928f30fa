"""The options of input scales, and what DMQ's row makes of the others."""

from __future__ import annotations

import pytest

from qdiff.api import calibrate
from qdiff.calibration.input_scales import InputScaling, Scaling
from qdiff.calibration.run import CalibrationRun
from qdiff.checkpoint import save_checkpoint
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


def test_finer_step_sizes_of_channels():
    assert plan("--method", "dmq", "--quant_act").quant.power_of_two_scales
    for words in ((), ("--quant_act", "--quant_mode", "dynamic"), ("--quant_act", "--modulate", "--cali_min_max")):
        assert not plan("--method", "dmq", *words).quant.power_of_two_scales, "no ranges of activations are calibrated"
    off = plan("--method", "dmq", "--quant_act", "--no-power_of_two_scales")
    assert not off.quant.power_of_two_scales and "power_of_two_scales" not in off.to_dict()["quant"]
    for method in ("linear", "qdiff", "gptq", "eda-dm", "tfmq-dm", "grip"):
        assert not plan("--method", method, "--quant_act").quant.power_of_two_scales
        assert plan("--method", method, "--quant_act", "--power_of_two_scales").quant.power_of_two_scales


def test_finer_step_sizes_are_those_of_a_file(wrap, data, tmp_path):
    path, words = tmp_path / "native", ("--quant_act", "--weight_bit", 4, "--cali_ckpt", tmp_path / "native")
    for given in (True, False):
        qnn = wrap(weight_bits=4, act_bits=8, power_of_two_scales=given)
        calibrate(qnn, data, "linear", run=CalibrationRun(show_progress=False))
        save_checkpoint(qnn, path)
        for method in ("qdiff", "dmq"):
            assert plan("--method", method, "--act_ranges", "shared", *words).quant.power_of_two_scales == given
            asked = plan("--method", method, *words, f"--{'no-' if given else ''}power_of_two_scales")
            assert asked.quant.power_of_two_scales == (not given)
        assert plan("--method", "dmq", *words, "--resume_w").quant.power_of_two_scales, "ranges are calibrated anew"
    path.write_bytes(b"damaged")
    assert plan("--method", "dmq", *words).quant.power_of_two_scales


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--power_of_two_scales",), "--power_of_two_scales needs quantized activations; add --quant_act"),
        (("--power_of_two_scales", "--quant_act", "--modulate"), "--power_of_two_scales .* contradicts --modulate"),
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


@pytest.mark.parametrize("words", [("--scaling", "search"), ("--power_of_two_scales",)])
def test_without_ptq_they_have_no_effect(words):
    (sentence,) = ignored_options(parsed(*words))
    assert f"{words[0]} has no effect" in sentence
