"""What a run will do about MoDiff: which options mean it, what they mean, and what contradicts what."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from qdiff.cli.options.parser import Parser, add_run_options
from qdiff.cli.options.ptq import add_ptq_options, resolve_ptq
from qdiff.cli.sample import SampleCommand
from qdiff.config import Ablation, ScalePer
from qdiff.errors import UserError
from qdiff.methods.modiff import ChangesConfig
from qdiff.pipeline import Pipeline
from qdiff.ranges.estimators import RangeMethod

W4A4 = ("--weight_bit", 4, "--quant_act", "--act_bit", 4)
DYNAMIC = ("--quant_mode", "dynamic")
CHECKPOINT, DATA = ("--cali_ckpt", "c.pth"), ("--cali_data_path", "d.pt")


def parsed(*words):
    parser = Parser(None)
    parser.add_argument("--seed", type=int, default=0)
    add_ptq_options(parser)
    add_run_options(parser)
    return parser.parse_args([str(w) for w in words])


def plan(*words):
    return resolve_ptq(parsed("--ptq", *W4A4, *words), RangeMethod.MSE, RangeMethod.MSE)


# --- Which method, and what is done

NAMES = {
    (): ("qdiff", "qdiff"),
    DYNAMIC: ("qdiff", "qdiff"),
    ("--modulate",): ("modiff", "qdiff"),
    ("--modulate", *DYNAMIC): ("modiff", "qdiff"),
    ("--modulate", "--method", "qdiff"): ("modiff", "qdiff"),
    ("--method", "modiff"): ("modiff", "qdiff"),
    ("--method", "modiff", "--modulate", *DYNAMIC): ("modiff", "qdiff"),
    ("--modulate", "--quant_mode", "linear"): ("linear+modiff", "linear"),
    ("--modulate", "--method", "linear"): ("linear+modiff", "linear"),
    ("--modulate", "--method", "linear", *DYNAMIC): ("linear+modiff", "linear"),
    ("--method", "modiff", "--quant_mode", "linear"): ("linear+modiff", "linear"),
    ("--modulate", "--method", "eda-dm", *DYNAMIC): ("eda-dm+modiff", "eda-dm"),
    ("--modulate", "--recon", *DYNAMIC): ("eda-dm+modiff", "eda-dm"),
    ("--method", "modiff", "--recon", *DYNAMIC): ("eda-dm+modiff", "eda-dm"),
    ("--modulate", "--method", "ptq4dm", *DYNAMIC): ("ptq4dm+modiff", "ptq4dm"),
    ("--modulate", "--method", "eda-dm", "--resume_w", *CHECKPOINT): ("eda-dm+modiff", "eda-dm"),
}


@pytest.mark.parametrize("words", NAMES, ids=" ".join)
def test_names(words):
    made = plan(*words)
    assert (made.name, made.method) == NAMES[words]
    assert made.quant.modulate is ("modiff" in made.name)
    assert made.quant.act_dynamic is ("dynamic" in words)
    assert (made.changes is None) is (not made.quant.modulate or made.quant.act_dynamic)


ACTIONS = {
    ("--modulate",): "calibrate",
    ("--modulate", *DATA): "calibrate",
    ("--modulate", *DYNAMIC): "calibrate",
    ("--modulate", *CHECKPOINT): "load",
    ("--modulate", "--resume", *CHECKPOINT): "load",
    ("--modulate", "--resume_w", *CHECKPOINT): "activations",
    ("--modulate", "--resume_w", "--cali_min_max", *CHECKPOINT, *DATA): "activations",
    # Nothing beside the weights is to be had.
    (*DYNAMIC, "--resume_w", *CHECKPOINT): "load",
    ("--modulate", *DYNAMIC, "--resume_w", *CHECKPOINT): "load",
    ("--modulate", *DYNAMIC, "--resume", *CHECKPOINT): "load",
    ("--modulate", *DYNAMIC, *CHECKPOINT): "load",
    ("--modulate", "--method", "eda-dm", *DYNAMIC): "calibrate",
    ("--modulate", "--method", "eda-dm", "--resume_w", *CHECKPOINT): "activations",
    ("--modulate", "--method", "eda-dm", *CHECKPOINT): "load",
    ("--modulate", "--method", "linear", *CHECKPOINT): "load",
}


@pytest.mark.parametrize("words", ACTIONS, ids=" ".join)
def test_actions(words):
    made = plan(*words)
    assert made.action == ACTIONS[words]
    assert made.checkpoint == ("c.pth" if "c.pth" in words else None)
    assert made.data == ("d.pt" if "d.pt" in words else None)


def test_eda_dm_draws_where_its_weights_are_calibrated_here():
    dynamic = plan("--modulate", "--method", "eda-dm", *DYNAMIC)
    assert dynamic.draw is not None and dynamic.recipe is not None and dynamic.samples == dynamic.draw.count
    static = plan("--modulate", "--method", "eda-dm", "--resume_w", *CHECKPOINT, "--cali_st", 4, "--cali_n", 5)
    assert static.draw is None and static.recipe is None and static.samples == 20
    assert static.quant.keep_ends and static.quant.modulate


def test_options_reach_the_config():
    quant = plan("--modulate", *DYNAMIC, "--rest_abit", 8, "--modulate_ablation", "cleared-state", "--a_sym").quant
    assert (quant.rest_bits, quant.ablation, quant.act_symmetric) == (8, Ablation.CLEARED_STATE, True)
    scales = {
        (): ScalePer.TENSOR,
        ("--act_tensor",): ScalePer.SAMPLE,  # as the published code has it
        ("--act_scale_per", "sample"): ScalePer.SAMPLE,
        ("--act_tensor", "--act_scale_per", "sample"): ScalePer.SAMPLE,
        ("--act_scale_per", "channel"): ScalePer.CHANNEL,
        ("--act_scale_per", "tensor"): ScalePer.TENSOR,
    }
    for words, wanted in scales.items():
        assert plan(*DYNAMIC, *words).quant.act_scale_per is wanted


@pytest.mark.parametrize("method", ["qdiff", "linear", "eda-dm"])
def test_ranges_of_changes_begin_at_their_extremes(method):
    loaded = ("--method", method, *DYNAMIC) if method != "qdiff" else ()
    assert plan("--modulate", *loaded).quant.act_range == RangeMethod.MIN_MAX
    assert plan("--modulate", *loaded, "--a_range", "mse").quant.act_range == RangeMethod.MSE
    assert plan("--modulate", *loaded).quant.weight_range == {
        "qdiff": RangeMethod.MSE, "linear": RangeMethod.MIN_MAX, "eda-dm": RangeMethod.SEARCH
    }[method]  # fmt: skip


def test_numbers_of_the_calibration():
    assert plan("--modulate").changes == ChangesConfig()
    words = ("--cali_iters_a", 12, "--cali_batch_size", 13, "--cali_lr", 0.5, "--cali_p", 2, "--out_penalty", 0.25)
    assert plan("--modulate", *words).changes == ChangesConfig(True, 12, 13, 0.5, 2.0, 0.25)
    assert plan("--modulate", "--cali_min_max").changes == ChangesConfig(learn=False)
    assert plan("--modulate", "--quant_mode", "linear").changes.learn is False
    assert plan("--modulate", "--method", "linear").changes.learn is False
    assert plan("--modulate", "--method", "linear", "--cali_min_max").changes.learn is False


# --- What contradicts what

CONTRADICTIONS = {
    "modulate in float": (("--modulate", "--no-quant"), ("--modulate", "--quant_act")),
    "modiff in float": (("--method", "modiff", "--no-quant"), ("--modulate", "--quant_act")),
    "dynamic in float": ((*DYNAMIC, "--no-quant"), ("--quant_mode dynamic", "--quant_act")),
    "sample static": (("--act_tensor",), ("--act_tensor", "--quant_mode dynamic")),
    "channel static": (("--modulate", "--act_scale_per", "channel"), ("--act_scale_per", "--quant_mode dynamic")),
    "two scales": ((*DYNAMIC, "--act_tensor", "--act_scale_per", "channel"), ("--act_tensor", "--act_scale_per")),
    "sample and tensor": ((*DYNAMIC, "--act_tensor", "--act_scale_per", "tensor"), ("--act_tensor", "--act_scale_per")),
    "rest alone": (("--rest_abit", 8), ("--rest_abit", "--modulate")),
    "rest too wide": (("--modulate", "--rest_abit", 17), ("--rest_abit", "from 2 to 16")),
    "ablation alone": (("--modulate_ablation", "no-compensation"), ("no-compensation", "--modulate")),
    "min-max alone": (("--cali_min_max",), ("--cali_min_max", "--modulate")),
    "min-max dynamic": (("--modulate", *DYNAMIC, "--cali_min_max"), ("--cali_min_max", "--quant_mode dynamic")),
    "penalty alone": (("--out_penalty", 1), ("--out_penalty", "--modulate")),
    "penalty dynamic": (("--modulate", *DYNAMIC, "--out_penalty", 1), ("--out_penalty", "--quant_mode dynamic")),
    "penalty min-max": (("--modulate", "--out_penalty", 1, "--cali_min_max"), ("--out_penalty", "--cali_min_max")),
    "penalty linear": (("--modulate", "--out_penalty", 1, "--quant_mode", "linear"), ("--out_penalty", "linear")),
    "penalty negative": (("--modulate", "--out_penalty", -1), ("--out_penalty", "finite")),
    "penalty infinite": (("--modulate", "--out_penalty", "inf"), ("--out_penalty", "finite")),
    "iterations": (("--modulate", "--cali_iters_a", 0), ("--cali_iters_a",)),
    "eda-dm calibrates singles": (
        ("--modulate", "--method", "eda-dm"),
        ("--method eda-dm", "--modulate", "--resume_w", "--quant_mode dynamic"),
    ),
    "ptq4dm calibrates singles": (("--modulate", "--method", "ptq4dm"), ("--method ptq4dm", "--modulate")),
    "linear resumed": (
        ("--modulate", "--quant_mode", "linear", "--resume_w", *CHECKPOINT),
        ("--resume_w", "--quant_mode linear"),
    ),
    "modiff resumed twice": (("--modulate", "--resume", "--resume_w", *CHECKPOINT), ("--resume", "--resume_w")),
    "dynamic resumed from nothing": ((*DYNAMIC, "--resume_w"), ("--resume_w", "--cali_ckpt")),
    "data and checkpoint": (("--modulate", *CHECKPOINT, *DATA), ("--cali_ckpt", "--cali_data_path", "--resume_w")),
    "recorded and quantized": (("--generate", "residual", *DATA), ("--generate", "--ptq")),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_one_sentence(name):
    words, says = CONTRADICTIONS[name]
    with pytest.raises(UserError) as caught:
        if "--no-quant" in words:
            given = parsed("--ptq", *(w for w in words if w != "--no-quant"))
            resolve_ptq(given, RangeMethod.MSE, RangeMethod.MSE)
        else:
            plan(*words)
    assert all(option in str(caught.value) for option in says) and "\n" not in str(caught.value)


def test_modulation_without_ptq_is_refused():
    with pytest.raises(UserError, match=r"--modulate .*--ptq"):
        resolve_ptq(parsed("--modulate"), RangeMethod.MSE, RangeMethod.MSE)
    with pytest.raises(UserError, match=r"--cali_data_path .*--ptq"):
        resolve_ptq(parsed(*DATA), RangeMethod.MSE, RangeMethod.MSE)
    assert resolve_ptq(parsed("--generate", "raw", *DATA), RangeMethod.MSE, RangeMethod.MSE) is None


# --- What the manifest says


def test_dict_is_json_and_holds_what_decides_the_result():
    assert "changes" not in plan().to_dict() and "modulate" not in plan().to_dict()["quant"]
    assert "changes" not in plan("--modulate", *DYNAMIC).to_dict()
    values = json.loads(json.dumps(plan("--modulate", "--out_penalty", 0.5).to_dict()))
    assert values["quant"]["modulate"] is True and values["changes"]["out_penalty"] == 0.5
    others = [
        ("--modulate", *DYNAMIC),
        ("--modulate", *DYNAMIC, "--act_tensor"),
        ("--modulate", *DYNAMIC, "--rest_abit", 8),
        ("--modulate", *DYNAMIC, "--modulate_ablation", "cleared-state"),
        ("--modulate", *DYNAMIC, "--modulate_ablation", "no-compensation"),
        ("--modulate",),
        ("--modulate", "--cali_min_max"),
        ("--modulate", "--out_penalty", 0.5),
        DYNAMIC,
        (),
    ]
    written = [json.dumps(plan(*words).to_dict(), sort_keys=True) for words in others]
    assert len(set(written)) == len(written)


# --- The command: --generate, and how many steps there are


def command(*words, calls=4):
    class Model(Pipeline):
        config = {}  # noqa: RUF012

    Model.calls = calls
    return SampleCommand("script", Model("model", SimpleNamespace(seed=0), 1, 1), parsed(*words))


def test_what_generate_records():
    asked = ("--cali_st", 2, "--cali_n", 3, *DATA)
    raw, residual = (command("--generate", kind, *asked) for kind in ("raw", "residual"))
    assert raw.plan is residual.plan is None and raw.config["method"] == "float"
    assert raw.config["generate"] == {"out": "d.pt", "pairs": False, "calls": [0, 2], "per_step": 3}
    assert residual.config["generate"] == {"out": "d.pt", "pairs": True, "calls": [1, 2], "per_step": 3}
    assert "generate" not in command().config


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--cali_st", 2), ("--generate residual", "--cali_data_path")),
        ((*DATA, "--cali_n", 0), ("--cali_n is 0",)),
        ((*DATA, "--cali_st", 4), ("--cali_st 4", "--cali_st 3 or less")),
        ((*DATA, "--cali_st", 0), ("--cali_st 1 to 3",)),
        ((*DATA, "--quant_act"), ("--quant_act", "--ptq")),
        ((*DATA, "--ptq"), ("--generate", "--ptq")),
    ],
)
def test_what_generate_refuses(words, says):
    with pytest.raises(UserError) as caught:
        command("--generate", "residual", *words)
    assert all(word in str(caught.value) for word in says) and "\n" not in str(caught.value)


def test_steps_of_pairs_are_checked_before_anything_is_loaded():
    static = ("--ptq", *W4A4, "--modulate")
    assert command(*static, "--cali_st", 3).plan.steps == 3
    with pytest.raises(UserError, match="--cali_st 3 or less"):
        command(*static, "--cali_st", 4)
    assert command(*static, *DYNAMIC, "--cali_st", 4).config["method"] == "modiff"  # single samples
    assert command(*static, "--cali_st", 40, *CHECKPOINT).plan.action == "load"
    assert command(*static, "--cali_st", 40, *DATA).plan.data == "d.pt"  # the file will tell
