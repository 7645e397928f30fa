"""The cost of a network whose time embedding is looked up: nothing is computed, and a table replaces float weights."""

from __future__ import annotations

import pytest

from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.quant_model import QuantModel
from qdiff.tracing.temporal_cache import temporal_layers, with_float_temporal

SHAPE, STEPS = (1, 8, 8), 7
W4A8 = {"weight_bits": 4, "act_bits": 8}


def of_temporal(counts, names):
    return [cost for cost in counts.layers if cost.name in names]


@pytest.mark.parametrize("in_float", [False, True])
def test_size_and_bit_operations(in_float, tiny_network):
    names = temporal_layers(tiny_network)
    config = QuantConfig(**W4A8)
    if in_float:
        config = with_float_temporal(config, tiny_network)
    qnn = QuantModel(tiny_network, config)
    before, after = account(qnn, SHAPE), account(qnn, SHAPE, cached_timesteps=STEPS)
    temporal = of_temporal(before, names)
    assert len(temporal) == len(names) and all(cost.macs > 0 for cost in temporal)
    assert before.bops - after.bops == sum(cost.bops for cost in temporal) > 0
    assert before.macs - after.macs == sum(cost.macs for cost in temporal)
    assert before.parameters == after.parameters
    # By hand: 8 residual blocks of 32 channels, one float32 for each channel and timestep.
    projections = [name for name in names if name.endswith("temb_proj")]
    table = STEPS * 32 * len(projections) * 4
    weights = sum((layer.weight.numel() + layer.bias.numel()) * 4 for n, layer in qnn.layers().items() if n in names)
    assert len(projections) == 8 and after.layers[-1].name == "temporal table"
    if in_float:
        assert before.size_bytes - after.size_bytes == weights - table
        assert sum(cost.size_bytes for cost in of_temporal(after, names)) == 0 != weights
    else:
        assert before.size_bytes == after.size_bytes  # quantized weights fill the table, so they are stored instead


def test_without_a_cache_nothing_changes(tiny_network):
    assert account(tiny_network, SHAPE).summary() == account(tiny_network, SHAPE, cached_timesteps=0).summary()
