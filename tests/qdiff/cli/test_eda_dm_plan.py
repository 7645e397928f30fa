"""What a run will do about EDA-DM: which options mean it, what they mean, and where values come from."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml

from qdiff.calibration.fitting import UnitKind
from qdiff.calibration.timesteps import Draw, Schedule
from qdiff.cli.options import eda_dm
from qdiff.cli.options.parser import Parser, add_run_options
from qdiff.cli.options.ptq import add_ptq_options, resolve_ptq
from qdiff.cli.sample import SampleCommand
from qdiff.errors import UserError
from qdiff.methods.eda_dm import EdaDmConfig
from qdiff.methods.ptq4dm import Ptq4dmConfig
from qdiff.pipeline import Pipeline
from qdiff.ranges.estimators import RangeMethod


def parsed(*words):
    parser = Parser(None)
    parser.add_argument("--seed", type=int, default=0)
    add_ptq_options(parser)
    add_run_options(parser)
    return parser.parse_args([str(w) for w in words])


def plan(*words, preset=None):
    return resolve_ptq(parsed("--ptq", *words), RangeMethod.MIN_MAX, RangeMethod.MSE, preset)


# --- Which method

IMPLYING = {
    "calib_im_mode": ("greedy",),
    "calib_t_mode": ("normal",),
    "calib_num_samples": (8,),
    "batch_samples": (4,),
    "lamda": (0,),
    "tdac_radius": (0.5,),
    "recon": (),
    "no-recon": (),
    "block_recon": (),
    "layer_recon": (),
    "add_loss": (0,),
    "lr_w": (0.1,),
    "lr_a": (0.1,),
    "qdrop": (0,),
}


def test_every_implying_option_is_listed():
    assert set(eda_dm.IMPLYING) == set(IMPLYING) - {"no-recon"}


@pytest.mark.parametrize("option", IMPLYING)
def test_an_option_of_its_own_means_eda_dm(option):
    words = (f"--{option}", *IMPLYING[option])
    assert plan(*words).method == plan("--method", "eda-dm", *words).method == "eda-dm"
    assert resolve_ptq(parsed(*words), RangeMethod.MSE, RangeMethod.MSE) is None  # float without --ptq
    named = option.removeprefix("no-")
    for other in (("--method", "qdiff"), ("--method", "linear"), ("--quant_mode", "linear")):
        with pytest.raises(UserError) as caught:
            plan(*words, *other)
        assert f"--{named} " in str(caught.value) and " ".join(other) in str(caught.value)


@pytest.mark.parametrize("words", [(), ("--class_cond",), ("--change_block_recon",), ("--keep_ends",), ("--a_sym",)])
def test_other_options_do_not(words):
    made = plan(*words)
    assert made.method == "qdiff" and made.draw is None


def test_named_methods():
    made = plan("--method", "eda-dm")
    assert made.method == "eda-dm" and isinstance(made.recipe, EdaDmConfig) and isinstance(made.draw, Draw)
    assert made.action == "calibrate" and made.samples == made.draw.count == 1024
    loaded = plan("--method", "eda-dm", "--cali_ckpt", "q.safetensors")
    assert (loaded.action, loaded.checkpoint) == ("load", "q.safetensors")
    assert plan("--method", "eda-dm", "--resume_w", "--cali_ckpt", "q", "--quant_act").action == "activations"
    for method in ("eda-dm", "ptq4dm"):
        with pytest.raises(UserError, match=f"--method {method} contradicts --quant_mode linear"):
            plan("--method", method, "--quant_mode", "linear")


def test_widths_and_ranges():
    quant = plan("--recon", "--weight_bit", 4, "--quant_act", "--act_bit", 6, "--split").quant
    assert (quant.weight_bits, quant.act_bits, quant.split_shortcut) == (4, 6, True)
    assert quant.weight_range == quant.act_range == RangeMethod.SEARCH
    one = plan("--recon", "--w_range", "max", "--a_range", "mse").quant
    assert (one.weight_range, one.act_range) == (RangeMethod.MIN_MAX, RangeMethod.MSE)


@pytest.mark.parametrize("method", ["qdiff", "linear", "eda-dm", "ptq4dm"])
def test_a_sym_means_the_opposite(method):
    """Absent it is the symmetric search in EDA-DM's scripts."""
    opposite = method in ("eda-dm", "ptq4dm")
    assert plan("--method", method, "--quant_act").quant.act_symmetric is opposite
    assert plan("--method", method, "--quant_act", "--a_sym").quant.act_symmetric is not opposite


@pytest.mark.parametrize("method", ["qdiff", "linear", "eda-dm", "ptq4dm"])
def test_keep_ends_is_on_for_eda_dm_and_anyones_choice(method):
    assert plan("--method", method).quant.keep_ends is (method in ("eda-dm", "ptq4dm"))
    assert plan("--method", method, "--keep_ends").quant.keep_ends is True
    assert plan("--method", method, "--no-keep_ends").quant.keep_ends is False


# --- The recipe and the draw

NUMBERS = {
    "calib_num_samples": (17, "draw", "count"),
    "batch_samples": (18, "draw", "batch_size"),
    "lamda": (1.5, "draw", "lamda"),
    "tdac_radius": (0.25, "draw", "radius"),
    "add_loss": (0.7, "recipe", "layer_weight"),
    "lr_w": (0.02, "recipe", "lr_rounding"),
    "lr_a": (0.03, "recipe", "lr_act"),
    "qdrop": (0.25, "recipe", "drop"),
    "cali_iters": (19, "recipe", "iterations"),
    "cali_batch_size": (20, "recipe", "batch_size"),
}


@pytest.mark.parametrize("option", NUMBERS)
def test_numbers_come_from_the_command_line_then_the_preset(option):
    value, part, name = NUMBERS[option]
    other = value / 2 if isinstance(value, float) else value + 1

    def resolved(*words, **preset):
        return getattr(getattr(plan("--method", "eda-dm", *words, preset=preset), part), name)

    assert resolved() == getattr({"draw": Draw, "recipe": EdaDmConfig}[part], name)
    assert resolved(**{option: other}) == other != resolved()
    assert resolved(f"--{option}", value, **{option: other}) == value == resolved(f"--{option}", value)


def test_all_other_numbers_stay():
    values = {option: value for option, (value, *_) in NUMBERS.items()}
    made = plan("--method", "eda-dm", "--lr_w", 0.5, preset=values)
    for option, (value, part, name) in NUMBERS.items():
        assert getattr(getattr(made, part), name) == (0.5 if option == "lr_w" else value)


def test_switched_off():
    """Zero and no are given, not absent."""
    values = {"recon": True, "add_loss": 0.8, "qdrop": 0.5, "lamda": 2.0}
    words = ("--no-recon", "--add_loss", 0, "--qdrop", 0, "--lamda", 0)
    made = plan(*words, preset=values)
    assert (made.recipe.reconstruct, made.recipe.layer_weight, made.recipe.drop) == (False, 0, 0)
    assert made.draw.lamda == 0
    assert plan("--method", "eda-dm").recipe.reconstruct and plan("--recon", preset={"recon": False}).recipe.reconstruct
    assert plan("--method", "eda-dm", preset={"recon": False}).recipe.reconstruct is False


@pytest.mark.parametrize(
    ("words", "unit"),
    [((), "block"), (("--block_recon",), "block"), (("--layer_recon",), "layer"), (("--recon_unit", "layer"), "layer")],
)
def test_unit(words, unit):
    assert plan("--recon", *words).recipe.unit is UnitKind(unit)


@pytest.mark.parametrize(
    ("words", "schedule"),
    [
        ((), "tdac"),
        (("--calib_im_mode", "greedy"), "tdac"),
        (("--calib_im_mode", "greedy", "--calib_t_mode", "normal"), "tdac"),  # as the published commands have it
        (("--calib_t_mode", "normal"), "tdac"),
        (("--calib_im_mode", "Q_diffusion"), "uniform"),
        (("--calib_im_mode", "noise_backward_t"), "normal"),
        (("--calib_im_mode", "noise_backward_t", "--calib_t_mode", "normal"), "normal"),
        (("--calib_im_mode", "noise_backward_t", "--calib_t_mode", "uniform"), "uniform"),
        (("--calib_im_mode", "noise_backward_t", "--calib_t_mode", "Qdiff"), "uniform"),
        (("--method", "ptq4dm"), "normal"),
        (("--method", "ptq4dm", "--calib_t_mode", "uniform"), "uniform"),
        (("--method", "ptq4dm", "--calib_im_mode", "Q_diffusion"), "uniform"),
    ],
)
def test_schedule(words, schedule):
    assert plan("--recon", *words).draw.schedule is Schedule(schedule)


def test_ptq4dm_is_the_recipe_without_the_layers():
    values = {"add_loss": 0.8, "lr_w": 0.01}
    made = plan("--method", "ptq4dm", preset=values)
    assert made.method == "ptq4dm" and made.recipe == Ptq4dmConfig(lr_rounding=0.01)
    assert plan("--method", "ptq4dm", "--add_loss", 0, preset=values).recipe == made.recipe


CONTRADICTIONS = {
    "two units": (("--block_recon", "--layer_recon"), ("--block_recon", "--layer_recon")),
    "two units by other names": (("--block_recon", "--recon_unit", "layer"), ("--block_recon", "--recon_unit layer")),
    "PTQ4DM and TDAC": (
        ("--method", "ptq4dm", "--calib_im_mode", "greedy"),
        ("--method ptq4dm", "--calib_im_mode greedy"),
    ),
    "PTQ4DM and FBR": (("--method", "ptq4dm", "--add_loss", 0.5), ("--method ptq4dm", "--add_loss")),
    "resume twice": (("--recon", "--resume", "--resume_w", "--cali_ckpt", "c"), ("--resume", "--resume_w")),
    "checkpoint and data": (
        ("--recon", "--cali_ckpt", "c", "--cali_data_path", "d"),
        ("--cali_ckpt", "--cali_data_path"),
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_name_both(name):
    words, says = CONTRADICTIONS[name]
    with pytest.raises(UserError) as caught:
        plan(*words)
    assert all(option in str(caught.value) for option in says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        ("--calib_num_samples", 0),
        ("--batch_samples", 0),
        ("--lamda", -1),
        ("--lamda", "inf"),
        ("--tdac_radius", 0),
        ("--add_loss", -1),
        ("--lr_w", 0),
        ("--lr_a", "nan"),
        ("--qdrop", 1),
        ("--cali_iters", 0),
        ("--cali_batch_size", -1),
    ],
    ids=lambda words: "".join(str(w) for w in words),
)
def test_numbers_out_of_range_name_the_option(words):
    with pytest.raises(UserError) as caught:
        plan("--method", "eda-dm", *words)
    assert words[0] in str(caught.value) and "\n" not in str(caught.value)


def test_dict_is_json_and_holds_what_decides_the_result():
    made = plan("--recon", "--quant_act", "--memory_budget", 2)
    values = json.loads(json.dumps(made.to_dict()))
    assert values["draw"]["schedule"] == "tdac" and values["recipe"]["unit"] == "block"
    assert values["quant"]["keep_ends"] is True
    assert made.to_dict() == plan("--recon", "--quant_act").to_dict()
    for words in (("--lamda", 3), ("--qdrop", 0), ("--calib_im_mode", "Q_diffusion"), ("--batch_samples", 3)):
        assert made.to_dict() != plan("--recon", "--quant_act", *words).to_dict(), words


# --- Files: the script's preset, the model's own section, the command line


def command(tmp_path, *words, preset=None, section=None):
    class Model(Pipeline):
        calls, config = 4, {}
        eda_dm = section or {}

    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump(preset or {}))
    return SampleCommand(
        "script", Model("model", SimpleNamespace(seed=0), 1, 1), parsed("--ptq", *words), str(path)
    ).plan


def test_command_line_before_model_before_preset(tmp_path):
    preset = {"lamda": 1.0, "lr_w": 0.1, "add_loss": 0.1, "calib_num_samples": 10}
    section = {"lr_w": 0.2, "add_loss": 0.2, "recon": False}
    made = command(tmp_path, "--method", "eda-dm", "--add_loss", 0.3, preset=preset, section=section)
    assert (made.draw.lamda, made.draw.count) == (1.0, 10)
    assert (made.recipe.lr_rounding, made.recipe.layer_weight, made.recipe.reconstruct) == (0.2, 0.3, False)
    assert command(tmp_path, "--method", "qdiff", preset=preset, section=section).draw is None


@pytest.mark.parametrize("where", ["preset", "section"])
def test_an_unknown_key_is_named(where, tmp_path):
    with pytest.raises(UserError, match="'lambda'") as caught:
        command(tmp_path, "--method", "eda-dm", **{where: {"lambda": 1.0, "lr_w": 0.1}})
    assert "\n" not in str(caught.value)
    assert command(tmp_path, **{where: {"lambda": 1.0}}).method == "qdiff"  # which does not look


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("lamda", "high", "a number"),
        ("lr_w", None, "a number"),
        ("lr_a", True, "a number"),
        ("cali_iters", 10.5, "a whole number"),
        ("recon", 1, "true or false"),
    ],
)
def test_a_value_of_another_kind_is_named(key, value, wanted, tmp_path):
    with pytest.raises(UserError, match=f"{key}: .*make it {wanted}") as caught:
        command(tmp_path, "--method", "eda-dm", section={key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "bedroom", "church", "imagenet", "stable-diffusion"])
def test_shipped_presets_are_complete(name, tmp_path):
    """A command that only names the method is the paper's: every number comes from the file."""
    from qdiff.io.repository import REPOSITORY
    from qdiff.io.yaml_files import read_config

    values = dict(read_config(REPOSITORY / "configs" / "eda-dm" / f"{name}.yaml", ""))
    wide = values.pop("w8", {})
    assert set(values) == set(NUMBERS) - {"qdrop"} and set(wide) < set(values)
    made = plan("--method", "eda-dm", preset=values)
    for option, value in values.items():
        _, part, field = NUMBERS[option]
        assert getattr(getattr(made, part), field) == value
    big = name in ("imagenet", "stable-diffusion")
    assert made.recipe.iterations == (1000 if big else 5000)
    assert made.recipe.batch_size == (2 if name == "stable-diffusion" else 32)
    assert made.draw.radius == (3.0 if name in ("cifar10", "imagenet") else 0.3)


# λ, γ, learning rates of rounding and of step sizes, as the commands of EDA-DM's README have them at W4A8 and W8A8.
PUBLISHED = {
    "cifar10": ((1.2, 0.8, 0.5, 5e-4), (1.3, 3.0, 5e-2, 1e-3)),
    "bedroom": ((100.0, 0.001, 1e-2, 5e-3), (100.0, 0.1, 5e-4, 1e-4)),
    "church": ((1.0, 1.0, 5e-2, 1e-4), (1.0, 1.0, 5e-2, 1e-4)),
    "imagenet": ((0.5, 1.3, 0.5, 1e-4), (0.5, 1.3, 1e-4, 1e-3)),
    "stable-diffusion": ((50.0, 0.5, 3e-2, 1e-4), (50.0, 0.5, 5e-4, 1e-4)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_presets_know_the_width(name, tmp_path):
    from qdiff.io.repository import REPOSITORY

    preset = yaml.safe_load((REPOSITORY / "configs" / "eda-dm" / f"{name}.yaml").read_text())
    for bits, numbers in zip((4, 8), PUBLISHED[name], strict=True):
        made = command(tmp_path, "--method", "eda-dm", "--weight_bit", bits, preset=preset)
        found = (made.draw.lamda, made.recipe.layer_weight, made.recipe.lr_rounding, made.recipe.lr_act)
        assert found == numbers
    assert made == command(tmp_path, "--method", "eda-dm", preset=preset)  # 8 is the default


def test_a_model_comes_before_the_width_of_a_preset(tmp_path):
    preset, section = {"lr_w": 0.1, "lr_a": 0.1, "w8": {"lr_w": 0.2, "lr_a": 0.2}}, {"lr_w": 0.3}
    for bits, numbers in ((8, (0.3, 0.2)), (4, (0.3, 0.1))):
        made = command(tmp_path, "--method", "eda-dm", "--weight_bit", bits, preset=preset, section=section).recipe
        assert (made.lr_rounding, made.lr_act) == numbers
    with pytest.raises(UserError, match="w8: 3; make it values by option name"):
        command(tmp_path, "--method", "eda-dm", preset={"w8": 3})
