"""GRIP is GPTQ with widths and ranges of its own, which everything that is asked for comes before."""

from __future__ import annotations

import argparse

import pytest
import torch

import qdiff
from qdiff.cli.options.ptq import add_ptq_options, resolve_ptq
from qdiff.config import LayerBits, QuantConfig
from qdiff.methods.gptq import GptqConfig
from qdiff.methods.grip import GripConfig
from qdiff.methods.registry import METHODS

W4A8 = "--weight_bit 4 --quant_act --act_bit 8"
ENDS = (("first", LayerBits(8, 16)), ("last", LayerBits(8, 16)))


def plan(words):
    parser = argparse.ArgumentParser()
    add_ptq_options(parser)
    args = parser.parse_args(["--ptq", "--method", "grip", *words.split()])
    args.generate = None
    return resolve_ptq(args, "max", "max")


def test_its_config():
    made = METHODS["grip"].quant_config(weight_bits=4, act_bits=8)
    assert made == QuantConfig(4, 8, split_shortcut=True, weight_range="mse", layer_bits=dict(ENDS))
    assert METHODS["grip"].quant_config(weight_bits=4, act_bits=8, layer_bits={}).layer_bits == ()
    assert METHODS["qdiff"].quant_config(weight_bits=4) == QuantConfig(4)


def test_the_commands_plan_has_it():
    made = plan(W4A8)
    assert made.quant == METHODS["grip"].quant_config(weight_bits=4, act_bits=8)
    assert made.recipe == GripConfig() and made.recipe.bias_correction
    assert made.to_dict()["recipe"]["bias_correction"] is True


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
