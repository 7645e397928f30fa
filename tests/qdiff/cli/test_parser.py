"""The options of the published DDIM script: names, defaults, and one-sentence errors."""

from __future__ import annotations

import argparse

import pytest

from ddim.options import add_model_options, add_sampler_options
from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import (
    Parser,
    add_calibration_options,
    add_quantization_options,
    add_run_options,
)
from qdiff.errors import UserError
from qdiff.methods.qdiffusion import QDiffusionConfig

# Defaults of Q-Diffusion's scripts/sample_diffusion_ddim.py, without --sequence and --max_images, which are the
# script's own. --cali_data_path is None here: the published default is a Stable Diffusion file.
PUBLISHED = {
    "seed": 1234,
    "logdir": "none",
    "use_pretrained": False,
    "sample_type": "generalized",
    "skip_type": "uniform",
    "timesteps": 1000,
    "eta": 0.0,
    "ptq": False,
    "quant_act": False,
    "weight_bit": 8,
    "act_bit": 8,
    "quant_mode": "qdiff",
    "cali_st": 1,
    "cali_batch_size": 32,
    "cali_n": 1024,
    "cali_iters": 20000,
    "cali_iters_a": 5000,
    "cali_lr": 0.0004,
    "cali_p": 2.4,
    "cali_ckpt": None,
    "cali_data_path": None,
    "resume": False,
    "resume_w": False,
    "cond": False,
    "a_sym": False,
    "running_stat": False,
    "sm_abit": 8,
    "split": False,
    "verbose": False,
}


@pytest.fixture
def parser() -> Parser:
    parser = Parser("about")
    for add in (
        add_model_options,
        add_sampler_options,
        add_quantization_options,
        add_calibration_options,
        add_run_options,
    ):
        add(parser)
    return parser


def test_published_defaults(parser):
    args = vars(parser.parse_args(["--config", "x"]))
    # How long a unit is fitted depends on the method; Q-Diffusion's recipe has the published numbers.
    recipe = {"cali_iters": QDiffusionConfig().iterations, "cali_batch_size": QDiffusionConfig().batch_size}
    assert args["split"] is None  # off, unless the method has it
    assert {name: recipe.get(name, args[name]) for name in PUBLISHED} == PUBLISHED | {"split": None}
    assert args["cali_iters"] is None and args["cali_batch_size"] is None


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_every_published_option_is_accepted(name, parser):
    value = PUBLISHED[name]
    other = {"sample_type": "ddpm_noisy", "skip_type": "quad", "quant_mode": "linear"}.get(name)
    if isinstance(value, bool):
        words, expected = [], True
    elif other is not None:
        words, expected = [other], other
    elif isinstance(value, int | float):
        words, expected = [str(value + 1)], value + 1
    else:
        words, expected = ["some/path"], "some/path"
    assert getattr(parser.parse_args(["--config", "x", f"--{name}", *words]), name) == expected


def test_short_and_optional_logdir(parser):
    assert parser.parse_args(["--config", "x", "-l", "out"]).logdir == "out"
    assert parser.parse_args(["--config", "x", "-l"]).logdir is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--confg", "x"], "--config"),
        ([], "--config"),
        (["--config", "x", "--cali", "3"], "--cali"),
        (["--config", "x", "--weight_bit", "4.5"], "--weight_bit"),
        (["--config", "x", "--quant_mode", "nearest"], "nearest"),
        (["--config", "x", "--timesteps"], "--timesteps"),
        (["--config", "x", "stray"], "stray"),
    ],
)
def test_bad_options_are_one_sentence(words, says, parser, capsys):
    with pytest.raises(UserError) as caught:
        parser.parse_args(words)
    message = str(caught.value)
    assert says in message and "--help" in message and "\n" not in message
    assert capsys.readouterr() == ("", "")  # argparse's usage text is not printed


def test_help_keeps_the_lines_of_the_description(capsys):
    with pytest.raises(SystemExit) as stop:
        Parser("first\n\n    example --x 1").parse_args(["--help"])
    assert stop.value.code == 0
    assert "\n    example --x 1\n" in capsys.readouterr().out


def test_user_errors_exit_with_code_2_and_one_line(capsys):
    @exits_cleanly
    def main():
        raise UserError("the file is not there; look again")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: the file is not there; look again\n")


def test_interruption_says_how_to_continue(capsys):
    @exits_cleanly
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted: repeat the same command to continue\n"


def test_other_errors_keep_their_traceback():
    @exits_cleanly
    def main():
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        main()


def test_arguments_reach_the_command():
    seen = []
    exits_cleanly(lambda *a, **k: seen.append((a, k)))([1], b=2)
    assert seen == [(([1],), {"b": 2})]
    assert isinstance(Parser(None), argparse.ArgumentParser)


PUBLISHED_BEGINNINGS = {"--max_image": ("max_images", 50000), "--cali_bat": ("cali_batch_size", 8)}


@pytest.mark.parametrize("option", PUBLISHED_BEGINNINGS)
def test_unambiguous_beginnings_are_taken(option):
    """MoDiff's README has ``--max_image 50000``."""
    from ddim.options import add_sample_options
    from qdiff.cli.options.ptq import add_ptq_options

    parser = Parser(None)
    add_sample_options(parser)
    add_ptq_options(parser)
    name, value = PUBLISHED_BEGINNINGS[option]
    args = parser.parse_args(["--config", "x.yml", option, str(value)])
    assert getattr(args, name) == value
    with pytest.raises(UserError, match="--cali could match"):
        parser.parse_args(["--config", "x.yml", "--cali", "3"])
