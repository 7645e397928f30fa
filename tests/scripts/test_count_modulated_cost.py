"""The counting command says what modulation costs, where there is any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

DIGITS = ("--config", Path(__file__).parents[2] / "configs" / "digits.yml", "--use_pretrained", "--layers", 1)
W4A4 = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 4, "--quant_mode", "dynamic")


def output(call, *options) -> str:
    outcome = call("count_cost", *DIGITS, *options)
    assert outcome.code == 0, outcome.err
    return outcome.out


@pytest.mark.slow
def test_state_and_additions_are_told(call):
    counted = json.loads(output(call, *W4A4, "--modulate", "--json"))
    numbers = counted["quantized"]
    assert numbers["state_bytes"] > counted["float"]["size_bytes"] / 10 and numbers["additions"] > 0
    assert numbers["first_bops"] > 2 * numbers["bops"] and numbers["calls"] is None
    assert counted["heaviest"][0]["first_act_bits"] == 32
    line = next(line for line in output(call, *W4A4, "--modulate").splitlines() if line.startswith("modulated: "))
    state, additions = (f"{numbers[key] / 1e6:.2f} M" for key in ("state_bytes", "additions"))
    assert f"keeps {state}B " in line and f"makes {additions} additions" in line
    assert f"{numbers['first_bops'] / 1e9:.1f} GBops" in line


@pytest.mark.parametrize("options", [(), W4A4], ids=["float", "W4A4"])
def test_without_modulation_there_is_no_word_of_it(options, call):
    assert "modulated" not in output(call, *options)
    counted = json.loads(output(call, *options, "--json"))
    assert not {"state_bytes", "additions", "first_bops", "calls"} & set(list(counted.values())[-3])
    assert "state_bytes" not in counted["heaviest"][0]
