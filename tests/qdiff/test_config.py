"""The config validates itself, stays what it is, and survives JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qdiff.config import QuantConfig, RangeMethod
from qdiff.errors import UserError


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
    assert config.weight_range is RangeMethod.MSE
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert QuantConfig.from_dict(config.to_dict()) != QuantConfig()


def test_unknown_fields_are_named():
    with pytest.raises(UserError, match="act_dynamics"):
        QuantConfig.from_dict({"act_dynamics": True})
