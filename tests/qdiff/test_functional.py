"""The arithmetic against plain Python integers and against autograd."""

from __future__ import annotations

import pytest
import torch

from qdiff.functional import (
    dequantize,
    fake_quantize,
    fake_quantize_inference,
    max_level,
    quantize,
)

# Relative L2. Sums of 200 float32 terms in another order differ by at most 200·2^−24 ≈ 1e-5.
GRADIENT_TOLERANCE = 1e-5
# Relative L2 of float32 sums against float64 ones.
SUM_TOLERANCE = 1e-6


def reference_levels(values, delta, zero_point, bits):
    """clamp(round(x/δ) + z, 0, 2^b − 1) in Python, which rounds halves to even as torch does."""
    return [min(max(round(v / delta) + zero_point, 0), 2**bits - 1) for v in values]


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_levels_match_plain_python(bits):
    # Quarters and a power-of-two step are exact in floating point, so halves really are halves.
    values = [i / 4 for i in range(-80, 81)]
    zero_point = max_level(bits) // 3
    q = quantize(torch.tensor(values), torch.tensor(0.5), torch.tensor(zero_point), bits)
    assert q.tolist() == reference_levels(values, 0.5, zero_point, bits)
    assert q.min() >= 0 and q.max() <= 2**bits - 1
    assert q.tolist() != reference_levels(values, 0.505, zero_point, bits) or bits == 1


def test_halves_round_to_even():
    q = quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), torch.tensor(1.0), torch.tensor(8), 4)
    assert q.tolist() == [8, 10, 10, 8, 6]


def test_the_middle_zero_point_is_the_signed_symmetric_quantizer():
    x, delta = torch.linspace(-3, 3, 101), torch.tensor(0.3)
    signed = torch.round(x / delta).clamp(-8, 7) * delta
    assert torch.equal(fake_quantize_inference(x, delta, torch.tensor(8), 4), signed)


def test_dequantize_inverts_levels_within_half_a_step():
    x = torch.linspace(-1, 2, 50)
    delta, zero_point = torch.tensor(3 / 255), torch.tensor(85)
    back = dequantize(quantize(x, delta, zero_point, 8), delta, zero_point)
    half_a_step = float(delta) / 2 * 1.0001  # the factor covers float32 rounding of the division
    assert (back - x).abs().max() <= half_a_step
    assert (back * 1.01 - x).abs().max() > half_a_step


def test_integers_of_any_dtype_dequantize():
    delta, zero_point = torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)
    assert dequantize(torch.tensor([0, 3, 5], dtype=torch.uint8), delta, zero_point).tolist() == [-1.5, 0.0, 1.0]


def straight_through(x, delta, zero_point, bits):
    """The definition, left to autograd: rounding has gradient 1, clamping its own."""
    scaled = x / delta
    rounded = scaled + (torch.round(scaled) - scaled).detach()
    return (torch.clamp(rounded + zero_point, 0, max_level(bits)) - zero_point) * delta


@pytest.mark.parametrize("per_channel", [False, True])
def test_gradients_match_autograd_of_the_definition(relative, per_channel):
    torch.manual_seed(0)
    x = torch.randn(6, 40)
    delta = torch.rand(6, 1) * 0.2 + 0.1 if per_channel else torch.tensor(0.17)
    zero_point = torch.tensor(6)
    upstream = torch.randn(6, 40)

    def gradients(function, delta):
        x_, delta_ = x.clone().requires_grad_(), delta.clone().requires_grad_()
        return torch.autograd.grad((function(x_, delta_, zero_point, 4) * upstream).sum(), (x_, delta_))

    (dx, ddelta), (dx_ref, ddelta_ref) = gradients(fake_quantize, delta), gradients(straight_through, delta)
    assert (dx_ref == 0).any(), "no value is clamped: the test is blind to the clamped case"
    assert relative(dx, dx_ref) < GRADIENT_TOLERANCE < relative(dx * 1.01, dx_ref)
    assert ddelta.shape == delta.shape
    assert relative(ddelta, ddelta_ref) < GRADIENT_TOLERANCE
    assert relative(gradients(fake_quantize, delta * 1.01)[1], ddelta_ref) > GRADIENT_TOLERANCE


def test_fake_quantize_gives_the_inference_values_and_leaves_its_input():
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    kept, delta, zero_point = x.clone(), torch.tensor(0.1), torch.tensor(7, dtype=torch.int32)
    values = fake_quantize(x.requires_grad_(), delta, zero_point, 4)
    assert torch.equal(values, fake_quantize_inference(x, delta, zero_point, 4))
    assert torch.equal(values, dequantize(quantize(x, delta, zero_point, 4), delta, zero_point))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 16])
def test_half_precision_is_quantized_as_in_float32(bits, dtype):
    """65,535 is infinite in float16, and 0·inf is NaN: a softmax of 16 bits once made black images."""
    x, delta = torch.linspace(0, 1, 999).to(dtype), torch.tensor(1 / max_level(bits))
    zero_point = torch.zeros((), dtype=torch.int32)
    made = fake_quantize_inference(x, delta, zero_point, bits)
    expected = fake_quantize_inference(x.float(), delta, zero_point, bits)
    assert made.dtype == dtype and torch.equal(made, expected.to(dtype))
    assert torch.equal(quantize(x, delta, zero_point, bits), quantize(x.float(), delta, zero_point, bits))
    planted = ((x / delta).round() * delta).to(dtype)  # x/δ in half precision
    assert not torch.equal(planted, made)


def test_float64_stays_float64():
    x, delta = torch.rand(99, dtype=torch.float64), torch.tensor(1 / 15, dtype=torch.float64)
    made = fake_quantize_inference(x, delta, torch.zeros((), dtype=torch.int32), 4)
    assert made.dtype == torch.float64 and torch.equal(made, (x / delta).round() * delta)
