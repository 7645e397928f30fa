"""Networks converted to half precision: step sizes stay in float32, and outputs stay near."""

from __future__ import annotations

import pytest
import torch

# Relative L2 of ε: half precision's rounding, and the values that it moves over a rounding edge.
HALF_TOLERANCE = 0.05
SOFTMAX_16 = {"weight_bits": 8, "act_bits": 8, "softmax_bits": 16}


@torch.no_grad()
def output(qnn, x, t):
    with qnn.quantized():
        return qnn(x, t)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["simulated", "packed", "integer"])
def test_a_network_in_half_precision(kind, dtype, calibrated, held_out, relative):
    x, t = held_out
    qnn = calibrated(**SOFTMAX_16)
    expected = output(qnn, x, t)
    if kind != "simulated":
        qnn.pack_weights(integer=kind == "integer")
    qnn.to(dtype)
    assert {q.delta.dtype for q in qnn.act_quantizers().values()} == {torch.float32}
    found = output(qnn, x.to(dtype), t)
    assert found.dtype == dtype and relative(found, expected) < HALF_TOLERANCE
    # Planted: five bits less for what the last layer takes.
    qnn.act_quantizers()["conv_out.act_quantizers.0"].delta.mul_(32.0)
    assert relative(output(qnn, x.to(dtype), t), expected) > HALF_TOLERANCE


def test_float64_goes_all_the_way(calibrated, held_out):
    x, t = held_out
    qnn = calibrated(**SOFTMAX_16).double()
    assert {q.delta.dtype for q in qnn.act_quantizers().values()} == {torch.float64}
    assert output(qnn, x.double(), t).dtype == torch.float64
