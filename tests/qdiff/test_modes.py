"""Weights that were cast once give what autocast gives by casting them at every call."""

from __future__ import annotations

import copy

import pytest
import torch

from qdiff.modes import halve_weights

FLOAT = {"weight_bits": None, "act_bits": None}
CONFIGS = {
    "float": FLOAT,
    "w4": {"weight_bits": 4},
    "w4a8 split": {"weight_bits": 4, "act_bits": 8, "split_shortcut": True},
    "activations alone": {"weight_bits": None, "act_bits": 8},
}


@torch.no_grad()
def under_autocast(qnn, given, dtype):
    casts = []
    with torch.autocast("cpu", dtype), qnn.quantized(), torch.profiler.profile() as seen:
        out = qnn(*given)
    casts = [event.count for event in seen.key_averages() if event.key == "aten::_to_copy"]
    return out, sum(casts)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS)
def test_outputs_are_equal_with_fewer_casts(config, dtype, calibrated, wrap, held_out):
    qnn = (wrap if CONFIGS[config] is FLOAT else calibrated)(**CONFIGS[config])
    qnn.release_float_weights()
    expected, before = under_autocast(qnn, held_out, dtype)
    halve_weights(qnn, dtype)
    found, after = under_autocast(qnn, held_out, dtype)
    assert torch.equal(found, expected)
    assert before - after >= len(qnn.layers())
    assert {layer.weight.dtype for layer in qnn.layers().values()} == {dtype}
    assert {q.delta.dtype for q in qnn.act_quantizers().values()} <= {torch.float32}


@pytest.mark.slow
@torch.no_grad()
def test_packed_layers_dequantize_into_half_precision(calibrated, held_out):
    qnn = calibrated(weight_bits=4, act_bits=8)
    released = copy.deepcopy(qnn)
    released.release_float_weights()
    expected, _ = under_autocast(released, held_out, torch.bfloat16)
    for integer in (False, True):
        packed = copy.deepcopy(qnn)
        packed.pack_weights(integer=integer)
        halve_weights(packed, torch.bfloat16)
        found, _ = under_autocast(packed, held_out, torch.bfloat16)
        assert torch.equal(found, expected) or (integer and (found - expected).norm() < 0.1 * expected.norm())


def test_weights_that_are_still_needed_in_float_are_not_cast(calibrated):
    with pytest.raises(AssertionError, match="still needed"):
        halve_weights(calibrated(weight_bits=4), torch.bfloat16)
