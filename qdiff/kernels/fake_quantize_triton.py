"""The kernel of `qdiff.kernels.fake_quantize`.

It computes y = (clamp(round(x/δ) + z, 0, 2^b − 1) − z)·δ in float32, with each step rounded as in PyTorch's own
kernels: the division is IEEE's (`/` in Triton is approximate on CUDA), halves are rounded to even, and no
multiplication is followed by an addition, so nothing can be contracted into a fused multiply-add.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_BITS = 16  # levels stay far below 2^22, from which on the kernel does not round
BLOCK = 1024


class Layout(NamedTuple):
    """Where the kernel finds the inputs for the p-th value of the output, which is stored in memory without gaps.

    Attributes:
        row, row_stride: x is at (p div row)·row_stride + p mod row; both are equal if x has no gaps either.
        step, count: δ and z are at (p div step) mod count; a single value is at 0.
    """

    row: int
    row_stride: int
    step: int
    count: int


def layout_of(x: Tensor, delta: Tensor, zero_point: Tensor, out: Tensor) -> Layout | None:
    """Return the layout, or None if the kernel does not support the tensors.

    It supports float32, float16 and bfloat16; one δ and z for all, or different ones along one dimension of x; and an x
    whose memory has no gaps, with any order of dimensions, or gaps of equal size between rows of equal size (a slice of
    one dimension).
    """
    ours = x.dtype in DTYPES and delta.dtype in DTYPES and zero_point.dtype != torch.float64
    return _layout(x.shape, x.stride(), out.stride(), delta.shape, zero_point.shape) if ours else None


@functools.lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    *of_ranges: tuple[int, ...],
) -> Layout | None:
    if 0 in shape:
        return Layout(1, 1, 1, 1)
    # Dimensions from the output's innermost on, as [size, x's stride]; those contiguous in x are merged into one.
    merged: list[list[int]] = []
    size = 1
    for dim in sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: out_strides[d]):
        if out_strides[dim] != size:
            return None
        size *= shape[dim]
        if merged and strides[dim] == merged[-1][0] * merged[-1][1]:
            merged[-1][0] *= shape[dim]
        else:
            merged.append([shape[dim], strides[dim]])
    merged = merged or [[1, 1]]
    if len(merged) > 2 or merged[0][1] != 1:
        return None
    row = merged[0][0]
    row_stride = merged[1][1] if len(merged) == 2 else row
    differs = {_range_dim(shape, other) for other in of_ranges} - {None}
    if len(differs) > 1 or -1 in differs:
        return None
    if not differs:
        return Layout(row, row_stride, 1, 1)
    (dim,) = differs
    return Layout(row, row_stride, out_strides[dim], shape[dim])


def _range_dim(shape: tuple[int, ...], ranges: tuple[int, ...]) -> int | None:
    """Return the dimension of x along which ranges differ; None for one range, −1 if the kernel cannot handle it."""
    offset = len(shape) - len(ranges)
    dims = [d for d, size in enumerate(ranges) if size != 1]
    if offset < 0 or len(dims) > 1 or any(ranges[d] != shape[d + offset] for d in dims):
        return -1
    return dims[0] + offset if dims else None


def launch(x: Tensor, delta: Tensor, zero_point: Tensor, bits: int, out: Tensor, layout: Layout) -> None:
    """Run the kernel.

    Args:
        x, delta, zero_point: supported by `layout_of`; all on one device.
        bits: width b, at most `MAX_BITS`.
        out: the output, which is written: x's shape, no gaps in memory, any floating dtype.
        layout: the result of `layout_of`.
    """
    if bits > MAX_BITS:
        raise ValueError(f"the kernel rounds levels of up to {MAX_BITS} bits, not {bits}")
    size = x.numel()
    if size == 0:
        return
    furthest = max(size, (size - 1) // layout.row * layout.row_stride + layout.row)
    kernel[(triton.cdiv(size, BLOCK),)](
        x,
        delta.contiguous(),
        zero_point.contiguous(),
        out,
        size,
        *layout,
        float(2**bits - 1),
        HAS_GAPS=layout.row != layout.row_stride,
        ONE_DELTA=delta.numel() == 1,
        ONE_ZERO=zero_point.numel() == 1,
        IS_WIDE=furthest + BLOCK >= 2**31,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )


@triton.jit
def kernel(
    x_ptr,
    delta_ptr,
    zero_ptr,
    out_ptr,
    size,
    row,
    row_stride,
    step,
    count,
    top,
    HAS_GAPS: tl.constexpr,
    ONE_DELTA: tl.constexpr,
    ONE_ZERO: tl.constexpr,
    IS_WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See the module. Arguments as in `Layout`; ``top`` is 2^b − 1; ``IS_WIDE`` uses 64-bit indices."""
    block = tl.program_id(0)
    if IS_WIDE:
        block = block.to(tl.int64)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    source = place
    if HAS_GAPS:
        source = place // row * row_stride + place % row
    x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
    if ONE_DELTA:
        delta = tl.load(delta_ptr).to(tl.float32)
    else:
        delta = tl.load(delta_ptr + place // step % count, mask=inside, other=1.0).to(tl.float32)
    if ONE_ZERO:
        zero = tl.load(zero_ptr).to(tl.float32)
    else:
        zero = tl.load(zero_ptr + place // step % count, mask=inside, other=0).to(tl.float32)
    scaled = tl.div_rn(x, delta)
    # Adding 1.5·2^23 leaves no bits for the fraction, so the sum is rounded, halves to even. The sign of a zero is
    # lost, as it is when z is added. Values of 2^22 and more are clamped regardless of their fraction.
    rounded = tl.where(tl.abs(scaled) < 4194304.0, (scaled + 12582912.0) - 12582912.0, scaled)
    q = tl.clamp(rounded + zero, 0.0, top, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + place, ((q - zero) * delta).to(out_ptr.dtype.element_ty), mask=inside)
