"""The options that select a quantization are those that give its config again."""

from __future__ import annotations

import pytest

from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, resolve_ptq
from qdiff.cli.options.words import quantization_words
from qdiff.config import QuantConfig

CONFIGS = [
    QuantConfig(weight_bits=4),
    QuantConfig(weight_bits=8, split_shortcut=True, weight_symmetric=True),
    QuantConfig(weight_bits=4, act_bits=8, softmax_bits=16, split_shortcut=True),
    QuantConfig(weight_bits=4, act_bits=6, act_symmetric=True, keep_ends=True),
    QuantConfig(weight_bits=4, act_bits=8, act_dynamic=True, act_scale_per="channel", rest_bits=7),
    QuantConfig(weight_bits=4, act_bits=8, act_dynamic=True),
    QuantConfig(weight_bits=4, act_bits=8, act_ranges="timestep"),
    QuantConfig(weight_bits=4, act_bits=8, power_of_two_scales=True),
    QuantConfig(weight_bits=4, act_bits=8, bos_aware=True),
    QuantConfig(weight_bits=4, act_bits=8, layer_bits={"first": "A16", "mid.attn_1.q": "W8A32"}),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_there_and_back(config):
    parser = Parser(None)
    add_ptq_options(parser)
    args = parser.parse_args([*quantization_words(config), "--cali_ckpt", "x"])
    plan = resolve_ptq(args, config.weight_range, config.act_range)
    assert (plan.action, plan.quant) == ("load", config)
