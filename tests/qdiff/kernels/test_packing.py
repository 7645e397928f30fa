"""Bit packing: sizes, layout, and the way back."""

from __future__ import annotations

import pytest
import torch

from qdiff.kernels.packing import pack, packed_bytes, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 17, 64])
def test_round_trip_at_exactly_the_width(bits, count):
    values = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    if count > 1:  # both ends of the range
        values[0], values[-1] = 0, 2**bits - 1
    stream = pack(values, bits)
    assert stream.dtype == torch.uint8
    assert stream.numel() == packed_bytes(count, bits) == -(-count * bits // 8)
    assert torch.equal(unpack(stream, bits, count), values)


def test_layout_is_a_little_endian_bit_stream():
    values = [1, 2, 7, 4, 0, 5]
    number = sum(v << (3 * i) for i, v in enumerate(values))  # Python's own big integer
    assert bytes(pack(torch.tensor(values, dtype=torch.uint8), 3).tolist()) == number.to_bytes(3, "little")


def test_any_shape_and_stride_is_packed_in_reading_order():
    values = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    assert torch.equal(unpack(pack(values.T, 4), 4, 12), values.T.reshape(-1))


def test_pack_does_not_share_memory():
    values = torch.zeros(4, dtype=torch.uint8)
    stream = pack(values, 8)
    values.fill_(9)
    assert stream.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_stream_of_another_length_is_refused(bits, change):
    stream = torch.zeros(packed_bytes(10, bits) + change, dtype=torch.uint8)
    with pytest.raises(ValueError, match="cannot hold 10 values"):
        unpack(stream, bits, 10)


@pytest.mark.parametrize("bits", range(1, 9))
def test_long_streams_are_worked_on_in_parts(bits):
    count = 8 * (1 << 18) + 13  # eight values more than a part, and some
    values = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    stream = pack(values, bits)
    assert torch.equal(unpack(stream, bits, count), values)
    assert torch.equal(stream[: bits * 100], pack(values[:800], bits))  # the layout does not depend on the length


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_big_endian_machines_unpack_alike(bits, monkeypatch):
    """They take the way of the other widths."""
    values = torch.arange(1000) % 2**bits
    stream = pack(values.to(torch.uint8), bits)
    monkeypatch.setattr("sys.byteorder", "big")
    assert torch.equal(unpack(stream, bits, 1000), values.to(torch.uint8))
