"""GRIP is GPTQ with widths and ranges of its own, which everything that is asked for comes before."""

from __future__ import annotations

import argparse

import pytest
import torch

import qdiff
from qdiff.calibration.mixed_precision import MixedPrecision
from qdiff.calibration.sensitivity import Measure
from qdiff.cli.options.mixed_precision import add_mixed_precision_options
from qdiff.cli.options.ptq import add_ptq_options, resolve_ptq
from qdiff.config import LayerBits, QuantConfig
from qdiff.methods.gptq import GptqConfig
from qdiff.methods.grip import GripConfig
from qdiff.methods.registry import METHODS

W4A8 = "--weight_bit 4 --quant_act --act_bit 8"
ENDS = (("first", LayerBits(8, 16)), ("last", LayerBits(8, 16)))


def plan(words, samples=False):
    parser = argparse.ArgumentParser()
    add_ptq_options(parser)
    add_mixed_precision_options(parser)
    args = parser.parse_args(["--ptq", "--method", "grip", *words.split()])
    args.generate = None
    return resolve_ptq(args, "max", "max", samples=samples)


def test_its_config():
    made = METHODS["grip"].quant_config(weight_bits=4, act_bits=8)
    assert made == QuantConfig(4, 8, split_shortcut=True, weight_range="mse", act_range="quick", layer_bits=dict(ENDS))
    assert METHODS["grip"].quant_config(weight_bits=4, act_bits=8, layer_bits={}).layer_bits == ()
    assert METHODS["qdiff"].quant_config(weight_bits=4) == QuantConfig(4)


def test_the_commands_plan_has_it():
    made = plan(W4A8)
    assert made.quant == METHODS["grip"].quant_config(weight_bits=4, act_bits=8)
    assert made.recipe == GripConfig() and made.recipe.bias_correction
    assert made.to_dict()["recipe"]["bias_correction"] is True


@pytest.mark.parametrize(
    ("words", "candidates", "act_target", "act_candidates"),
    [
        (W4A8, (2, 3, 4, 5, 6, 8), 8, (6, 7, 8, 10, 16)),
        ("--weight_bit 4 --quant_act --act_bit 4", (2, 3, 4, 5, 6, 8), 4, (2, 3, 4, 5, 6, 8, 10, 16)),
        ("--weight_bit 8 --quant_act --act_bit 8", (6, 7, 8), 8, (6, 7, 8, 10, 16)),
        ("--weight_bit 2", (2, 4, 5, 6, 8), None, MixedPrecision.act_candidates),
    ],
)
def test_with_a_sampler_to_go_through_it_chooses_widths(words, candidates, act_target, act_candidates):
    made = plan(words, samples=True)
    bits = int(words.split()[1])
    assert made.mixed == MixedPrecision(
        bits, candidates, act_target, act_candidates, Measure.TRAJECTORY, samples=16, bounded=True
    )
    assert made.quant.layer_bits == ()  # the ends are chosen too
    assert made.to_dict()["mixed"]["measure"] == "trajectory"


@pytest.mark.parametrize("words", ["--quant_mode dynamic", "--modulate --quant_mode dynamic", "--modulate"])
def test_inputs_whose_ranges_are_not_calibrated_keep_their_widths(words):
    made = plan(f"{W4A8} {words}", samples=True)
    assert (made.mixed.target, made.mixed.act_target, made.mixed.bounded) == (4, None, True)
    assert made.quant.layer_bits == (("first", LayerBits(None, 16)), ("last", LayerBits(None, 16)))
    assert plan(f"{W4A8} {words} --uniform_widths", samples=True).quant.layer_bits == ENDS


def test_where_it_has_nothing_to_choose():
    grip, modulated = METHODS["grip"], {"act_bits": 8, "act_dynamic": True, "modulate": True}
    assert grip.chooses_for(QuantConfig(4, **modulated)) and grip.chooses_for(QuantConfig(None, 8))
    assert not grip.chooses_for(QuantConfig(None, **modulated))
    assert not grip.chooses_for(QuantConfig(4, 8, layer_bits={"conv_in": "W8"}))
    assert not METHODS["gptq"].chooses_for(QuantConfig(4, 8))


@pytest.mark.parametrize(
    "words",
    [
        "--uniform_widths",
        "--layer_bits none",
        "--layer_bits last=W8",
        "--cali_ckpt file.pth",
    ],
)
def test_what_it_does_not_choose(words):
    assert plan(f"{W4A8} {words}", samples=True).mixed is None
    assert plan(W4A8).mixed is None  # a loop of diffusers


def test_the_number_of_trajectories_can_be_given():
    assert plan(f"{W4A8} --sensitivity_samples 4", samples=True).mixed.samples == 4


def test_other_targets_come_first():
    made = plan(f"{W4A8} --target_act_bits 8 --sensitivity probe", samples=True)
    assert (made.mixed.target, made.mixed.act_target, made.mixed.measure) == (None, 8.0, Measure.PROBE)
    assert made.quant.layer_bits == ENDS


def test_weights_alone_have_8_bit_ends():
    assert plan("--weight_bit 4").quant.layer_bits == (("first", LayerBits(8)), ("last", LayerBits(8)))


@pytest.mark.parametrize(
    ("words", "field", "expected"),
    [
        ("--w_range max", "weight_range", "max"),
        ("--layer_bits none", "layer_bits", ()),
        ("--layer_bits last=W8", "layer_bits", (("last", LayerBits(8)),)),
        ("--keep_ends", "keep_ends", True),
        ("--no-split", "split_shortcut", False),
    ],
)
def test_what_is_asked_for_comes_first(words, field, expected):
    assert getattr(plan(f"{W4A8} {words}").quant, field) == expected


def test_it_has_the_options_of_gptq():
    assert plan(f"{W4A8} --gptq_target plain --no-bias_correction").recipe == GripConfig("plain", bias_correction=False)


@pytest.mark.slow
def test_it_rounds_as_gptq_does(wrap, data):
    config = METHODS["grip"].quant_config(weight_bits=4, act_bits=8)
    ours, theirs = (wrap(**config.to_dict()) for _ in range(2))
    qdiff.calibrate(ours, data, "grip", seed=3)
    qdiff.calibrate(theirs, data, "gptq", GptqConfig(), seed=3)
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    first, last = (ours.model.get_submodule(name) for name in ours.ends)
    assert [q.bits for q in (*first.act_quantizers, *last.act_quantizers)] == [16, 16]
    assert first.weight_quantizers[0].bits == last.weight_quantizers[0].bits == 8
