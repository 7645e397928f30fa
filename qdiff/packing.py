"""Store b-bit integers at b bits each, for any b from 1 to 8."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes ``count`` integers of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned integers.

    Args:
        values: uint8, any shape, each below 2^bits.
        bits: width, 1 to 8.

    Returns:
        uint8 [⌈count·bits/8⌉]: a little-endian bit stream, first value in the lowest bits.
    """
    flat = values.detach().reshape(-1).cpu()
    if bits == 8:
        return flat.clone()
    # Eight values fill exactly `bits` bytes: work on such groups, as 64-bit words.
    groups = torch.zeros((flat.numel() + 7) // 8 * 8, dtype=torch.int64)
    groups[: flat.numel()] = flat.long()
    words = (groups.view(-1, 8) << (torch.arange(8) * bits)).sum(dim=1)
    stream = (words[:, None] >> (torch.arange(bits) * 8)) & 0xFF
    return stream.to(torch.uint8).reshape(-1)[: packed_bytes(flat.numel(), bits)].clone()


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: uint8 [count].

    Raises:
        ValueError: the stream does not hold exactly ``count`` values of ``bits`` bits.
    """
    if stream.numel() != packed_bytes(count, bits):
        raise ValueError(f"{stream.numel()} bytes cannot hold {count} values of {bits} bits")
    if bits == 8:
        return stream.clone()
    padded = torch.zeros((count + 7) // 8 * bits, dtype=torch.int64)
    padded[: stream.numel()] = stream.long()
    words = (padded.view(-1, bits) << (torch.arange(bits) * 8)).sum(dim=1)
    values = (words[:, None] >> (torch.arange(8) * bits)) & (2**bits - 1)
    return values.reshape(-1)[:count].to(torch.uint8)
