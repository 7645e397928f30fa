"""The config validates itself, stays what it is, and survives JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qdiff.config import Ablation, QuantConfig, ScalePer
from qdiff.errors import UserError
from qdiff.ranges.estimators import RangeMethod


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"weight_bits": 0}, "--weight_bit"),
        ({"weight_bits": 9}, "--weight_bit"),
        ({"weight_bits": 4.5}, "--weight_bit"),
        ({"act_bits": 1}, "--act_bit"),
        ({"act_bits": 17}, "--act_bit"),
        ({"softmax_bits": 1}, "--sm_abit"),
        ({"softmax_bits": 17}, "--sm_abit"),
        ({"softmax_bits": None}, "--sm_abit"),
        ({"act_bits": 4, "modulate": True, "rest_bits": 1}, "--rest_abit"),
        ({"act_bits": 4, "modulate": True, "rest_bits": 17}, "--rest_abit"),
    ],
)
def test_a_width_out_of_range_names_the_option(values, option):
    with pytest.raises(UserError, match=option):
        QuantConfig(**values)


@pytest.mark.parametrize("values", [{"weight_bits": 1}, {"weight_bits": 8}, {"act_bits": 2}, {"act_bits": 16}])
def test_the_bounds_themselves_are_allowed(values):
    QuantConfig(**values)


def test_none_keeps_a_side_in_float():
    config = QuantConfig(weight_bits=None, act_bits=None)
    assert config.weight_bits is None and config.act_bits is None


@pytest.mark.parametrize("field", ["weight_range", "act_range"])
def test_an_unknown_range_method_is_a_user_error(field):
    with pytest.raises(UserError, match=field):
        QuantConfig(**{field: "median"})


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantConfig().weight_bits = 4


def test_json_round_trip():
    config = QuantConfig(weight_bits=3, act_bits=None, act_symmetric=True, split_shortcut=True, weight_range="mse")
    assert config.weight_range == RangeMethod.MSE
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert QuantConfig.from_dict(config.to_dict()) != QuantConfig()


def test_unknown_fields_are_named():
    with pytest.raises(UserError, match="act_dynamics"):
        QuantConfig.from_dict({"act_dynamics": True})


# --- Dynamic ranges and modulation

STATIC = {"act_bits": 4, "modulate": True}
DYNAMIC = {"act_bits": 4, "act_dynamic": True}
BOTH = {**STATIC, **DYNAMIC}


@pytest.mark.parametrize(
    ("values", "options"),
    [
        ({"act_dynamic": True}, ("--quant_act", "--quant_mode dynamic")),
        ({"modulate": True}, ("--quant_act", "--modulate")),
        ({"act_bits": 4, "act_scale_per": "sample"}, ("--quant_mode dynamic", "--act_tensor", "--act_scale_per")),
        ({**STATIC, "act_scale_per": "channel"}, ("one range per channel", "--quant_mode dynamic")),
        ({"rest_bits": 8}, ("--rest_abit", "--modulate", "--quant_mode dynamic")),
        ({"act_bits": 4, "rest_bits": 8}, ("--rest_abit", "--modulate", "--quant_mode dynamic")),
        ({"act_bits": 4, "ablation": "cleared-state"}, ("cleared-state", "--modulate")),
        ({**DYNAMIC, "ablation": "no-compensation"}, ("no-compensation", "--modulate")),
        ({**BOTH, "act_scale_per": "batch"}, ("act_scale_per", "tensor, sample, channel")),
        ({**BOTH, "ablation": "none"}, ("ablation", "no-compensation, cleared-state")),
    ],
)
def test_contradictions_are_one_sentence(values, options):
    with pytest.raises(UserError) as caught:
        QuantConfig(**values)
    assert all(option in str(caught.value) for option in options) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "acts", "changes", "attention"),
    [
        ({}, False, False, None),
        ({"act_bits": 4, "softmax_bits": 16}, True, False, (4, 16)),
        (DYNAMIC, False, False, None),
        ({**DYNAMIC, "rest_bits": 6}, False, False, (6, 6)),
        (STATIC, False, True, None),
        ({**STATIC, "rest_bits": 6, "softmax_bits": 16}, False, True, (6, 6)),
        (BOTH, False, False, None),
        ({**BOTH, "rest_bits": 8}, False, False, (8, 8)),
    ],
)
def test_what_is_calibrated_and_how_wide_attention_is(values, acts, changes, attention):
    config = QuantConfig(**values)
    assert (config.calibrates_acts, config.calibrates_changes) == (acts, changes)
    assert config.attention_widths == attention


MODULATION = {
    "keep_ends": True,
    "act_dynamic": True,
    "act_scale_per": "sample",
    "modulate": True,
    "rest_bits": 8,
    "ablation": "no-compensation",
}


def test_fields_that_came_later_are_written_where_they_say_something():
    """Files and manifests from before there were any mean the same."""
    assert not set(MODULATION) & set(QuantConfig(act_bits=8).to_dict())
    assert set(QuantConfig(**STATIC).to_dict()) - set(QuantConfig(act_bits=4).to_dict()) == {"modulate"}
    config = QuantConfig(act_bits=4, **MODULATION)
    values = json.loads(json.dumps(config.to_dict()))
    assert {name: values[name] for name in MODULATION} == MODULATION
    assert QuantConfig.from_dict(values) == config
    assert (config.act_scale_per, config.ablation) == (ScalePer.SAMPLE, Ablation.NO_COMPENSATION)


ENDS = ("first", "last")


@pytest.mark.parametrize("values", [STATIC, MODULATION | {"act_bits": 4}], ids=["static", "dynamic"])
def test_the_last_layer_of_a_modulated_network_is_left_out(values):
    config = QuantConfig(**{**values, "keep_ends": True})
    assert config.of_layer("between", ENDS) is config
    first, last = (config.of_layer(name, ENDS) for name in ENDS)
    assert first == dataclasses.replace(config, weight_bits=8)
    assert last.act_bits is None and last.weight_bits == 8 and last.attention_widths is None
    assert not (last.modulate or last.act_dynamic or last.calibrates_changes)
    assert (last.rest_bits, last.ablation, last.act_scale_per) == (None, None, ScalePer.TENSOR)
    plain = dataclasses.replace(config, keep_ends=False)
    assert plain.of_layer("last", ENDS) is plain
