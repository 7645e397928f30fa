"""``awq_w4a16``: both packings element by element, and what rounding of scales and zeros does to a weight."""

from __future__ import annotations

import pytest
import torch
from linear_networks import LinearNetwork, random_weights, weight_in_double

from qdiff.deploy.awq import GROUP, nibbles_in_order, nibbles_interleaved, scales_and_zeros, why_not_awq

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def random_levels(rows, columns):
    return torch.randint(16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_even_channel_is_the_low_nibble():
    q = random_levels(6, 10)
    packed = nibbles_in_order(q)
    assert packed.dtype == torch.int8 and packed.shape == (6, 5)
    values = packed.int() % 256  # of the byte, unsigned
    assert torch.equal(values, q[:, 0::2].int() + 16 * q[:, 1::2].int())


def test_the_interleaved_words():
    """Each nibble is where the published layout has it, found by its row and channel."""
    q = random_levels(12, 192)
    packed = nibbles_interleaved(q)
    assert packed.dtype == torch.int32 and packed.shape == (3, 96)
    for row, channel in ((0, 0), (0, 8), (1, 31), (5, 63), (11, 191), (2, 64), (7, 100), (10, 33)):
        # 16 words of 16 bits per row and 64 channels; rows of a group of four follow each other.
        word = (channel // 64 * 4 + row % 4) * 16 + channel % 64 // 32 * 8 + channel % 8
        pair = int(packed[row // 4, word // 2]) % 2**32
        half = pair >> 16 if word % 2 else pair % 2**16
        assert half >> (4 * (channel % 32 // 8)) & 15 == int(q[row, channel])


def test_the_interleaved_words_hold_every_nibble_once():
    q = random_levels(8, 128)
    before = torch.bincount(q.flatten().int(), minlength=16)
    packed = nibbles_interleaved(q).contiguous().view(torch.uint8).int()
    assert torch.equal(torch.bincount(torch.cat([packed % 16, packed // 16]).flatten(), minlength=16), before)


def stated_weight(layer, centre, dtype):
    """Return W = (q − c)·s + m in float64, from scales and zeros as they are stored."""
    scales, zeros = (t.double().T.repeat_interleave(GROUP, dim=1) for t in scales_and_zeros(layer, centre, dtype))
    return (layer.integers().double() - centre) * scales + zeros, scales


@pytest.mark.parametrize("centre", [0, 8])
@pytest.mark.parametrize("bits", [2, 4])
def test_steps_of_few_bits_are_exact_in_float32(centre, bits):
    qnn = random_weights(LinearNetwork(), short_steps=True, weight_bits=bits)
    for name, layer in qnn.layers().items():
        assert torch.equal(stated_weight(layer, centre, torch.float32)[0], weight_in_double(qnn, name))


@pytest.mark.parametrize("dtype", list(UNIT), ids=str)
@pytest.mark.parametrize("centre", [0, 8])
def test_rounding_is_within_the_stated_bound(centre, dtype):
    qnn, unit = random_weights(LinearNetwork(), weight_bits=4), UNIT[dtype]
    for name, layer in qnn.layers().items():
        expected = weight_in_double(qnn, name)
        found, scales = stated_weight(layer, centre, dtype)
        channels = zip(layer.weight_quantizers, layer.slices, strict=True)
        zero_points = torch.cat([q.zero_point.double().expand(-1, n) for q, n in channels], dim=1)
        of_scale = 0 if dtype == torch.float32 else unit * expected.abs()
        of_zero = unit * scales * (centre - zero_points).abs()
        error = (found - expected).abs()
        assert (error <= (of_scale + of_zero) * (1 + 1e-9)).all() and error.max() > 0
        assert (error[layer.integers() == zero_points] <= (of_zero * (1 + 1e-9))[layer.integers() == zero_points]).all()


def test_symmetric_ranges_have_no_zeros_in_comfyui():
    qnn = random_weights(LinearNetwork(), weight_bits=4, weight_symmetric=True)
    for name, layer in qnn.layers().items():
        scales, zeros = scales_and_zeros(layer, 8, torch.float32)
        assert not zeros.any() and scales.shape == (layer.weight.shape[1] // GROUP, layer.weight.shape[0])
        assert torch.equal(stated_weight(layer, 8, torch.float32)[0], weight_in_double(qnn, name))


def test_steps_below_the_range_of_float16():
    layer = random_weights(LinearNetwork(), weight_bits=4).layers()["first"]
    assert why_not_awq(layer, torch.float16) is None
    layer.weight_quantizers[0].delta[3] = 2.0**-15
    assert why_not_awq(layer, torch.float16) == "step sizes outside the range of float16"
    assert why_not_awq(layer, torch.bfloat16) is None
    layer.weight_quantizers[0].delta[3] = 5000.0  # the zero, of up to 15 steps, would be infinite
    assert why_not_awq(layer, torch.float16) == "step sizes outside the range of float16"
