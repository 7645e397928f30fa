"""Products of activations whose channels have step sizes δ/2^k, with one operand's integers shifted accordingly."""

from __future__ import annotations

import pytest
import torch

from qdiff.kernels import integer_matmul
from qdiff.kernels.integer_matmul import Geometry, Levels, integer_product

IN, OUT = 16, 6


def levels(shape, bits, per_channel, seed, shifts=None):
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(0, 2**bits, shape, generator=generator)
    places = (shape[0], *[1] * (len(shape) - 1)) if per_channel else ()
    zero = torch.randint(0, 2**bits, places, generator=generator).int()
    delta = torch.rand(places, generator=generator).double() + 0.01
    return Levels(integers.to(torch.uint8), delta, zero, bits, shifts)


def shifts_of(rows, *trailing):
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 4, (rows, IN, *trailing), generator=generator).to(torch.uint8)


def values(levels):
    """δ/2^k·(q − z) in float64, from its parts."""
    made = (levels.integers.double() - levels.zero_point.double()) * levels.delta
    return made if levels.shifts is None else made * 0.5 ** levels.shifts.double()


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_shifted_integers_are_the_same_values_at_one_step_size(bits):
    given = levels((OUT, IN, 3, 3), bits, True, 1, shifts_of(1, 1, 1))
    given.integers[0], given.integers[1] = 0, 2**bits - 1  # the extremes, at every shift
    given.zero_point[0], given.zero_point[1] = 2**bits - 1, 0
    made = given.shifted()
    assert torch.equal(values(made), values(given)) and made.shifts is None
    assert made.bits == bits + 4 and made.integers.min() >= 0 and made.integers.max() < 2**made.bits
    assert torch.equal(given.values(), values(given)), "a power of two rounds nothing"
    narrow = Levels(given.integers, given.delta, given.zero_point, bits, given.shifts.clamp(max=1)).shifted(1)
    assert narrow.bits == bits + 2
    planted = Levels(given.integers, given.delta, given.zero_point, bits, given.shifts ^ 1).shifted()
    assert not torch.equal(values(planted), values(given))


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "by sample"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["conv1x1", "conv3x3"])
def test_products(kind, bits, rows, monkeypatch):
    kernel = 1 if kind == "conv1x1" else 3
    used = []
    right = integer_matmul._int8_sums
    monkeypatch.setattr(integer_matmul, "_int8_sums", lambda *given: used.append(given) or right(*given))
    monkeypatch.setattr(integer_matmul, "int8_is_fast", lambda device: True)
    monkeypatch.setattr(integer_matmul, "int8_is_exact", lambda device: True)
    x = levels((3, IN, 5, 5), 8, rows > 1, 2, shifts_of(rows, 1, 1))
    weight = levels((OUT, IN, kernel, kernel), bits, True, 3)
    geometry = Geometry((1, 1), (kernel // 2,) * 2, (1, 1), 1)
    found = integer_product(x, weight, geometry)
    wanted = torch.nn.functional.conv2d(values(x), values(weight), padding=kernel // 2)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert bool(used) == (bits == 4 and rows == 1), "shifted 4-bit weights fit int8; wider operands take float64"
    planted = integer_product(Levels(x.integers, x.delta, x.zero_point, 8, x.shifts.roll(1, 1)), weight, geometry)
    assert not torch.allclose(planted, wanted, rtol=1e-3)
