"""Options that a plan does not use: refused beside a calibrated file, and out of range with any method."""

from __future__ import annotations

import pytest

from qdiff.cli.options.mixed_precision import add_mixed_precision_options
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, resolve_ptq
from qdiff.errors import UserError
from qdiff.ranges.estimators import RangeMethod

LOADED = ("--cali_ckpt", "quantized.pth")
RESUMED = (*LOADED, "--resume_w", "--quant_act")


def plan(*words):
    parser = Parser(None)
    add_ptq_options(parser)
    add_mixed_precision_options(parser)
    return resolve_ptq(parser.parse_args(["--ptq", *map(str, words)]), RangeMethod.MSE, RangeMethod.MSE, samples=True)


def refused(words, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        plan(*words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("checkpoint", [LOADED, RESUMED])
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("qdiff", ("--weight_start", "gptq")),
        ("gptq", ("--gptq_target", "plain")),
        ("gptq", ("--gptq_factor", 1)),
        ("gptq", ("--gptq_factor", 0)),
        ("gptq", ("--gptq_damping", 0.1)),
        ("tfmq-dm", ("--tfmq_every", 2)),
        ("grip", ("--uniform_widths",)),
        ("qdiff", ("--refit", 1)),
    ],
)
def test_what_decides_weights_is_refused_beside_calibrated_ones(checkpoint, method, given):
    plan("--method", method, *given, "--quant_act")
    plan("--method", method, *checkpoint)
    refused(("--method", method, *given, *checkpoint), f"{given[0]} belongs to calibrating, and --cali_ckpt names what")


@pytest.mark.parametrize("given", [("--bias_correction",), ("--temporal_unit",), ("--cali_spacing", "ends")])
def test_what_calibrates_activations_too_is_refused_beside_whole_files(given):
    plan(*RESUMED, *given)
    refused((*LOADED, *given), f"{given[0]} belongs to calibrating")


def test_options_of_the_papers_commands_may_be_repeated():
    plan(*LOADED, "--resume", "--cali_iters", 7, "--cali_st", 20, "--cali_n", 256, "--cali_batch_size", 32)
    plan(*LOADED, "--no-bias_correction", "--no-temporal_unit")


@pytest.mark.parametrize(
    ("method", "given", "sentence"),
    [
        ("gptq", ("--cali_batch_size", 0), "give --cali_batch_size at least 1"),
        ("linear", ("--cali_batch_size", -7), "give --cali_batch_size at least 1"),
        ("linear", ("--cali_iters", 0), "give --cali_iters at least 1"),
        ("gptq", ("--cali_lr", "nan"), "give --cali_lr and --cali_p numbers above 0"),
        ("qdiff", ("--cali_lr", "inf"), "give --cali_lr and --cali_p numbers above 0"),
        ("grip", ("--cali_p", -1), "give --cali_lr and --cali_p numbers above 0"),
        ("tfmq-dm", ("--cali_iters_a", -5), "give --cali_iters_a at least 1"),
        ("eda-dm", ("--cali_lr_w", 0), "give --cali_lr_w a finite number above 0"),
        ("ptq4dm", ("--cali_iters_a", 0), "give --cali_iters_a at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_with_any_method(method, given, sentence):
    refused(("--method", method, *given), sentence)


@pytest.mark.parametrize("method", ["linear", "gptq", "grip", "eda-dm", "tfmq-dm", "dmq", "qdiff", "ptq4dm"])
def test_one_command_serves_to_compare_methods(method):
    numbers = ("--cali_iters", 5, "--cali_iters_a", 5, "--cali_lr", 1e-3, "--cali_batch_size", 4, "--running_stat")
    assert plan("--method", method, *numbers).method == method


@pytest.mark.parametrize("method", ["linear", "gptq", "grip"])
def test_only_numbers_are_looked_at(method):
    """Q-Diffusion refuses this pair."""
    plan("--method", method, "--objective", "fisher", "--recon_unit", "layer")
