"""What a run will do about quantization, for every combination of the options that decide it."""

from __future__ import annotations

import itertools
import json

import pytest

from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, ignored_options, resolve_ptq
from qdiff.errors import UserError
from qdiff.methods.qdiffusion import UnitKind, WeightObjective
from qdiff.ranges.estimators import RangeMethod


def plan(*words, weight_range=RangeMethod.MIN_MAX, act_range=RangeMethod.MIN_MAX):
    parser = Parser(None)
    add_ptq_options(parser)
    return resolve_ptq(parser.parse_args([str(w) for w in words]), weight_range, act_range)


CHECKPOINT, DATA = ("--cali_ckpt", "c.pth"), ("--cali_data_path", "d.pt")
DECIDING = {
    "ckpt": CHECKPOINT,
    "data": DATA,
    "resume": ("--resume",),
    "resume_w": ("--resume_w",),
    "quant_act": ("--quant_act",),
    "linear": ("--quant_mode", "linear"),
}


def expected(chosen: set[str]) -> str | tuple[str, ...]:
    """Return the action of a combination, or the words of its error. Written from the options' meaning."""
    if {"resume", "resume_w"} <= chosen:
        return "--resume", "--resume_w"
    if "resume" in chosen:
        return "load" if "ckpt" in chosen else ("--resume", "--cali_ckpt")
    if "resume_w" in chosen:
        if "ckpt" not in chosen:
            return "--resume_w", "--cali_ckpt"
        if "quant_act" not in chosen:
            return "--resume_w", "--quant_act"
        # The linear method rounds weights itself: those of the checkpoint would be lost without a word.
        return ("--resume_w", "--quant_mode linear") if "linear" in chosen else "activations"
    if {"ckpt", "data"} <= chosen:
        return "--cali_ckpt", "--cali_data_path"
    return "load" if "ckpt" in chosen else "calibrate"


COMBINATIONS = [
    frozenset(chosen) for size in range(len(DECIDING) + 1) for chosen in itertools.combinations(DECIDING, size)
]


@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda chosen: "+".join(sorted(chosen)) or "none")
def test_every_combination(chosen):
    words = [w for name in sorted(chosen) for w in DECIDING[name]]
    outcome = expected(set(chosen))
    if isinstance(outcome, tuple):
        with pytest.raises(UserError) as caught:
            plan("--ptq", *words)
        assert all(option in str(caught.value) for option in outcome)
        return
    made = plan("--ptq", *words)
    assert made.action == outcome
    assert made.method == ("linear" if "linear" in chosen else "qdiff")
    assert made.checkpoint == ("c.pth" if "ckpt" in chosen else None)
    assert made.data == ("d.pt" if "data" in chosen else None)
    assert made.quant.act_bits == (8 if "quant_act" in chosen else None)
    assert (made.recipe is None) == ("linear" in chosen)


def test_float_without_ptq():
    assert plan() is None
    assert plan("--weight_bit", 4, "--act_bit", 4, "--split", "--a_sym") is None  # the papers' scripts allow it


@pytest.mark.parametrize("words", [DECIDING["quant_act"], ("--resume",), ("--resume_w",), CHECKPOINT, DATA])
def test_ptq_options_without_ptq_name_both(words):
    with pytest.raises(UserError) as caught:
        plan(*words)
    assert words[0] in str(caught.value) and "--ptq" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ((), "qdiff"),
        (("--quant_mode", "qdiff"), "qdiff"),
        (("--quant_mode", "linear"), "linear"),
        (("--method", "linear"), "linear"),
        (("--method", "qdiff"), "qdiff"),
        (("--method", "linear", "--quant_mode", "linear"), "linear"),
        (("--method", "linear", "--quant_mode", "qdiff"), "linear"),  # qdiff is the default, so it cannot contradict
    ],
)
def test_method(words, method):
    assert plan("--ptq", *words).method == method


def test_contradicting_method_and_mode():
    with pytest.raises(UserError, match="--method qdiff contradicts --quant_mode linear"):
        plan("--ptq", "--method", "qdiff", "--quant_mode", "linear")


def test_widths_and_ranges_reach_the_config():
    words = ("--weight_bit", 3, "--quant_act", "--act_bit", 6, "--sm_abit", 16, "--a_sym", "--split")
    quant = plan("--ptq", *words, "--w_range", "mse").quant
    assert (quant.weight_bits, quant.act_bits, quant.softmax_bits) == (3, 6, 16)
    assert quant.act_symmetric and quant.split_shortcut
    assert (quant.weight_range, quant.act_range) == (RangeMethod.MSE, RangeMethod.MIN_MAX)
    plain = plan("--ptq").quant
    assert not plain.act_symmetric and not plain.split_shortcut


def test_ranges_default_to_the_script_s():
    quant = plan("--ptq", act_range=RangeMethod.MSE).quant
    assert (quant.weight_range, quant.act_range) == (RangeMethod.MIN_MAX, RangeMethod.MSE)
    assert plan("--ptq", "--a_range", "max", act_range=RangeMethod.MSE).quant.act_range == RangeMethod.MIN_MAX


def test_recipe_takes_the_calibration_options():
    words = ("--cali_iters", 11, "--cali_iters_a", 12, "--cali_batch_size", 13, "--cali_lr", 0.5, "--cali_p", 2)
    made = plan("--ptq", *words, "--running_stat", "--objective", "fisher")
    recipe = made.recipe
    assert (recipe.iterations, recipe.act_iterations, recipe.batch_size) == (11, 12, 13)
    assert (recipe.lr_act, recipe.p, recipe.running_stat) == (0.5, 2.0, True)
    assert (recipe.objective, recipe.unit) == (WeightObjective.FISHER, UnitKind.BLOCK)
    assert plan("--ptq", "--recon_unit", "layer").recipe.unit is UnitKind.LAYER
    assert (made.steps, made.per_step) == (1, 1024)
    assert (plan("--ptq", "--cali_st", 20, "--cali_n", 256).steps, made.memory_budget) == (20, None)


@pytest.mark.parametrize(
    "words",
    [
        ("--weight_bit", 0),
        ("--weight_bit", 9),
        ("--quant_act", "--act_bit", 1),
        ("--quant_act", "--act_bit", 17),
        ("--sm_abit", 1),
        ("--sm_abit", 17),
        ("--cali_st", 0),
        ("--cali_n", -1),
        ("--cali_iters", 0),
        ("--cali_iters_a", 0),
        ("--cali_batch_size", 0),
        ("--cali_lr", 0),
        ("--cali_lr", "nan"),
        ("--cali_p", -1),
        ("--memory_budget", -0.5),
        ("--memory_budget", "nan"),
        ("--memory_budget", "inf"),
    ],
    ids=lambda words: "".join(str(w) for w in words),
)
def test_numbers_out_of_range_name_the_option(words):
    with pytest.raises(UserError) as caught:
        plan("--ptq", *words)
    assert words[-2] in str(caught.value) and "\n" not in str(caught.value)


def test_dict_is_json_and_holds_what_decides_the_result():
    made = plan("--ptq", "--quant_act", "--memory_budget", 2)
    values = json.loads(json.dumps(made.to_dict()))
    assert values["quant"]["act_bits"] == 8 and values["quant"]["weight_range"] == "max"
    assert values["recipe"]["iterations"] == 20000 and values["recipe"]["unit"] == "block"
    assert made.memory_budget == 2
    assert made.to_dict() == plan("--ptq", "--quant_act").to_dict()  # the memory budget decides nothing
    assert made.to_dict() != plan("--ptq", "--quant_act", "--cali_lr", 0.001).to_dict()
    assert json.loads(json.dumps(plan("--ptq", "--method", "linear").to_dict()))["recipe"] is None


def test_weight_ranges_are_symmetric_where_asked_for():
    assert plan("--ptq", "--w_sym").quant.weight_symmetric
    assert not plan("--ptq").quant.weight_symmetric


@pytest.mark.parametrize(
    "words",
    [
        *(("--weight_bit", 4), ("--act_bit", 6), ("--split",), ("--a_sym",), ("--w_sym",), ("--w_range", "mse")),
        *(("--keep_ends",), ("--act_tensor",), ("--rest_abit", 8), ("--lamda", 1.2), ("--recon",)),
    ],
    ids=lambda words: words[0],
)
def test_what_has_no_effect_is_said(words):
    def said(*given):
        parser = Parser(None)
        add_ptq_options(parser)
        return ignored_options(parser.parse_args([str(word) for word in given]))

    assert said(*words) == [f"without --ptq the float model samples, and {words[0]} has no effect"]
    assert said() == said("--cali_st", 5) == said("--ptq", "--quant_act", *words) == []
    said_of_activations = ["--act_bit has no effect without --quant_act: activations stay in float"]
    assert said("--ptq", *words) == (said_of_activations if words[0] == "--act_bit" else [])
