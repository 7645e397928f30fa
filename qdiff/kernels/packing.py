"""Pack b-bit integers at b bits each, for any b from 1 to 8, and compress floats without loss."""

from __future__ import annotations

import sys
import zlib

import torch
from torch import Tensor

# For widths that divide a byte, all values of one byte are spread over one word of this type.
_WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
_FLOAT_BYTES = 4
_AT_A_TIME = 1 << 18  # groups of eight values, so that temporary tensors fit the cache


def packed_bytes(count: int, bits: int) -> int:
    """Return the number of bytes for ``count`` integers of ``bits`` bits."""
    return (count * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned integers.

    Args:
        values: uint8, any shape, each below 2^bits, on any device.
        bits: width, 1 to 8.

    Returns:
        uint8 [⌈count·bits/8⌉] on the same device: a little-endian bit stream, first value in the lowest bits.
    """
    flat = values.detach().reshape(-1)
    if bits == 8:
        return flat.clone()
    # Eight values fill exactly `bits` bytes, so such groups are processed as 64-bit words.
    count, groups = flat.numel(), (flat.numel() + 7) // 8
    padded = flat.new_zeros(groups * 8)
    padded[:count] = flat
    stream = flat.new_empty(groups, bits)
    for part, out in zip(padded.view(-1, 8).split(_AT_A_TIME), stream.split(_AT_A_TIME), strict=True):
        word = _joined(part, bits)
        for byte in range(bits):
            out[:, byte] = (word >> (8 * byte)) & 0xFF
    return stream.view(-1)[: packed_bytes(count, bits)].clone()


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: uint8 [count], on the stream's device; at 8 bits it is the stream itself.

    Raises:
        ValueError: the stream does not hold exactly ``count`` values of ``bits`` bits.
    """
    if stream.numel() != packed_bytes(count, bits):
        raise ValueError(f"{stream.numel()} bytes cannot hold {count} values of {bits} bits")
    if bits == 8:
        return stream
    if bits in _WORDS and sys.byteorder == "little":
        return _spread(stream, bits)[:count]
    groups = (count + 7) // 8
    padded = stream.new_zeros(groups * bits)
    padded[: stream.numel()] = stream
    values = stream.new_empty(groups, 8)
    for part, out in zip(padded.view(-1, bits).split(_AT_A_TIME), values.split(_AT_A_TIME), strict=True):
        word = _joined(part, 8)
        for value in range(8):
            out[:, value] = (word >> (bits * value)) & (2**bits - 1)
    return values.view(-1)[:count]


def _joined(rows: Tensor, bits: int) -> Tensor:
    """Return one 64-bit word per row of [n, k]: the row's values ``bits`` bits apart, the first in the lowest bits."""
    word = rows[:, 0].long()
    for i in range(1, rows.shape[1]):
        word |= rows[:, i].long() << (bits * i)
    return word


def _spread(stream: Tensor, bits: int) -> Tensor:
    """Unpack widths that divide a byte: each value of a byte goes to the lowest bits of its own byte of a word.

    By doubling: the upper half of the values moves to the upper half of the word, then likewise within each half. At
    4 bits, this is more than ten times as fast as groups of eight values.
    """
    word = stream.to(_WORDS[bits])
    width = 8  # bits at the bottom of each field that still hold several values
    field = 8 * word.element_size()
    while width > bits:
        field, width = field // 2, width // 2
        mask = sum((2**width - 1) << at for at in range(0, 8 * word.element_size(), field))
        word = (word | (word << (field - width))).bitwise_and_(mask)
    return word.view(torch.uint8)


def deflate_floats(values: Tensor) -> Tensor:
    """Compress float32 values without loss.

    Bytes of equal significance are stored together, because zlib compresses the bytes with sign and exponent well.

    Args:
        values: float32 [n], on the CPU.

    Returns:
        uint8, a zlib stream.
    """
    planes = values.view(torch.uint8).reshape(values.numel(), _FLOAT_BYTES).T.contiguous()
    return torch.frombuffer(bytearray(zlib.compress(planes.numpy().tobytes(), 9)), dtype=torch.uint8)


def inflate_floats(stream: Tensor, count: int) -> Tensor:
    """Inverse of `deflate_floats`: float32 [count]. A stream of more values is not inflated beyond ``count``.

    Raises:
        ValueError: the stream does not hold ``count`` values.
        zlib.error: it is not a zlib stream.
    """
    inflater = zlib.decompressobj()
    content = bytearray(inflater.decompress(stream.numpy().tobytes(), count * _FLOAT_BYTES + 1))
    if len(content) != count * _FLOAT_BYTES or not inflater.eof:
        raise ValueError(f"not the {count} float values that are needed")
    planes = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return planes.view(_FLOAT_BYTES, count).T.reshape(-1).view(torch.float32)
