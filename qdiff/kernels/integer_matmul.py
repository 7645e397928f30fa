"""Integer products of quantized tensors: Σ (q_x − z_x)·(q_w − z_w) is summed exactly, then scaled once.

Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference" (CVPR
2018), section 2.2. Up to 8 bits, int8 products are summed in int32. With q' = q − c and z' = z − c, where c = 2^(b−1)
turns every unsigned b-bit integer into int8,

    Σ (q_x − z_x)(q_w − z_w) = Σ q'_x·q'_w − z'_w·Σ q'_x − z'_x·Σ q'_w + K·z'_x·z'_w   over K terms.

Wider activations, and devices whose int8 products are inexact or slower, use float64, which holds every such sum
exactly: the result is the same to the bit.

Where channels of an activation have step sizes δ/2^k (`Levels.shifts`), one operand takes them over, so that the sum
over channels has one step size: the weight's integers are shifted left by m − k bits (4-bit weights then fit int8), or
the activation's own where k depends on the sample.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.config import QuantConfig, ScalePer
from qdiff.errors import UserError
from qdiff.functional import MOST_SHIFT, dequantize, finer, max_level

ROWS_BYTES = 1 << 26  # bytes of patches that are unfolded at a time
# Requirements of CUDA's `torch._int_mm` (`_int_mm_out_cuda` in PyTorch's aten/src/ATen/native/cuda/Blas.cpp).
CUDA_ROWS = 32  # more than 16
CUDA_MULTIPLE = 8  # of K and N


@dataclass(frozen=True)
class Levels:
    """A quantized tensor δ·(q − z), stored as integers.

    Attributes:
        integers: levels from 0 to 2^b − 1, of any dtype.
        delta, zero_point: broadcast against ``integers``: one for all or one per sample for an activation, one per
            output channel for a weight.
        bits: width b.
        shifts: k of step sizes δ/2^k, uint8 of the same rank as ``integers``: per channel [1, C, 1, …], or
            [N, C, 1, …]. None for 0.
    """

    integers: Tensor
    delta: Tensor
    zero_point: Tensor
    bits: int
    shifts: Tensor | None = None

    def values(self) -> Tensor:
        """Return the dequantized values, as `qdiff.functional.fake_quantize_inference` returns them."""
        return dequantize(self.integers, finer(self.delta, self.shifts), self.zero_point)

    def shifted(self, most: int = MOST_SHIFT) -> Levels:
        """Return the same values with one step size δ/2^m for all channels: integers 2^(m−k)·(q − z), b + m + 1 bits.

        Args:
            most: m, not below any k.
        """
        bits = self.bits + most + 1
        middle = 2 ** (bits - 1)
        integers = (self.integers.int() - self.zero_point) * (1 << (most - self.shifts)) + middle
        return Levels(integers, self.delta / 2**most, torch.full_like(self.zero_point, middle), bits)

    @property
    def exact(self) -> Tensor:
        """Return q − z as float64."""
        return self.integers.double() - self.zero_point

    @property
    def centre(self) -> int:
        """The number to subtract from the levels to fit int8."""
        return 2 ** (self.bits - 1)


@dataclass(frozen=True)
class Geometry:
    """Where a convolution applies its kernel: one number per spatial dimension, as in PyTorch's layers.

    Integer products support only 1 group and numeric padding (not a word such as "same").
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int


def check_integer_products(config: QuantConfig) -> None:
    """Raise a `UserError` if the products of a network cannot be computed with integers."""
    if config.act_bits is None:
        raise UserError("integer products need quantized activations, which have no width; add --quant_act")
    check_one_scale(config)


def check_one_scale(config: QuantConfig) -> None:
    """Raise a `UserError` if activations have ranges per channel: a sum over channels cannot be scaled at once."""
    if config.act_dynamic and config.act_scale_per is ScalePer.CHANNEL:
        raise UserError(
            "integer products cannot use one range per channel (a sum over channels is scaled once); give "
            "--act_scale_per tensor or sample"
        )


def integer_product(x: Levels, weight: Levels, geometry: Geometry | None) -> Tensor:
    """Multiply a quantized input by a quantized weight.

    Args:
        x: [N, …, in] for a linear layer, [N, in, …] for a convolution.
        weight: [out, in] or [out, in, …].
        geometry: geometry of the convolution; None for a linear layer.

    Returns:
        The layer's output without bias, in δ's dtype. Only the last multiplication, by the step sizes, is rounded.
    """
    if x.shifts is not None:
        x, weight = _of_one_step_size(x, weight)
    terms = weight.integers[0].numel()
    fits = terms * max_level(x.bits) * max_level(weight.bits) < 2**31
    device = x.integers.device
    narrow = max(x.bits, weight.bits) <= 8 and fits and int8_is_exact(device) and int8_is_fast(device)
    sums = _int8_sums(x, weight, geometry) if narrow else _float64_sums(x, weight, geometry)
    per_channel = weight.delta.flatten()
    if geometry is not None:
        per_channel = per_channel.view(-1, *[1] * len(geometry.stride))
    return sums.to(x.delta.dtype) * (x.delta * per_channel)


def _of_one_step_size(x: Levels, weight: Levels) -> tuple[Levels, Levels]:
    """Return operands of the same product without shifts."""
    if len(x.shifts) > 1:  # these differ from sample to sample
        return x.shifted(), weight
    by_channel = x.shifts.view(1, -1, *[1] * (weight.integers.dim() - 2))
    return replace(x, shifts=None), replace(weight, shifts=by_channel).shifted()


def _float64_sums(x: Levels, weight: Levels, geometry: Geometry | None) -> Tensor:
    if geometry is None:
        return F.linear(x.exact, weight.exact)
    convolve = {1: F.conv1d, 2: F.conv2d}[len(geometry.stride)]
    return convolve(x.exact, weight.exact, None, geometry.stride, geometry.padding, geometry.dilation)


def _int8_sums(x: Levels, weight: Levels, geometry: Geometry | None) -> Tensor:
    q, z = _int8(x.integers, x.centre), (x.zero_point - x.centre).to(torch.int32)
    if geometry is not None:  # channels last, so that copies are contiguous
        q, z = q.movedim(1, -1), z.movedim(1, -1) if z.dim() else z
    kernel = _int8(weight.integers, weight.centre).movedim(1, -1)
    matrix = kernel.flatten(1)
    weight_z = (weight.zero_point - weight.centre).flatten().to(torch.int32)
    # z'_x is per sample: [N or 1, 1].
    constant = z.reshape(-1, 1) * (matrix.shape[1] * weight_z - matrix.sum(dim=1, dtype=torch.int32))
    # A row of ones next to the weights returns Σ q'_x with the same product.
    factor = torch.cat([matrix, torch.ones_like(matrix[:1])]).t()

    positions = q[0].numel() if geometry is None else q[0, ..., 0].numel() * kernel[0, ..., 0].numel() * q.shape[-1]
    samples = max(1, ROWS_BYTES // max(1, positions))
    constants, zs = (t.expand(len(q), *t.shape[1:]) for t in (constant, z.reshape(-1, *[1] * (q.dim() - 1))))
    sums = []
    for part, fill, rest in zip(q.split(samples), zs.split(samples), constants.split(samples), strict=True):
        rows = part if geometry is None else _patches(part, fill, kernel.shape[1:-1], geometry)
        product = int8_matmul(rows.reshape(-1, matrix.shape[1]), factor)
        out = product[:, :-1] - product[:, -1:] * weight_z
        # All spatial positions of a sample share its constant.
        sums.append(out.view(*rows.shape[:-1], -1) + rest.view(len(part), *[1] * (rows.dim() - 2), -1))
    total = torch.cat(sums)
    return total if geometry is None else total.movedim(-1, 1)


def _int8(integers: Tensor, centre: int) -> Tensor:
    return (integers.to(torch.int16) - centre).to(torch.int8)


def _patches(x: Tensor, fill: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Unfold x [N, …, in] into the inputs of every output, [N, …, in · kernel]; ``fill`` is the integer for 0."""
    if any(geometry.padding):
        sizes = [size + 2 * pad for size, pad in zip(x.shape[1:-1], geometry.padding, strict=True)]
        padded = fill.to(torch.int8).expand(len(x), *sizes, x.shape[-1]).contiguous()
        inside = tuple(slice(pad, pad + size) for size, pad in zip(x.shape[1:-1], geometry.padding, strict=True))
        padded[(slice(None), *inside)] = x
        x = padded
    for dim, (size, stride, dilation) in enumerate(zip(kernel, geometry.stride, geometry.dilation, strict=True), 1):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    channels = 1 + len(kernel)  # now [N, …, in, kernel…]; the weight is [out, kernel…, in]
    return x.movedim(channels, -1).flatten(channels)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a·b as int32 for int8 a [M, K] and b [K, N], on the CPU or on CUDA; see `int8_is_exact`."""
    return _padded_int_mm(a, b) if a.device.type == "cuda" else torch._int_mm(a, b)


def _padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Multiply with the sizes and memory layout that CUDA's kernel supports; padding with zeros changes no sum.

    The kernel refuses fewer than 17 rows, and K and N that are not multiples of 8. Integer tensor cores read both
    factors along K, so b is stored by columns.
    """
    (rows, terms), columns = a.shape, b.shape[1]
    more_terms = -terms % CUDA_MULTIPLE
    a = F.pad(a, (0, more_terms, 0, max(0, CUDA_ROWS - rows))).contiguous()
    b = F.pad(b.t(), (0, more_terms, 0, -columns % CUDA_MULTIPLE)).contiguous().t()
    return torch._int_mm(a, b)[:rows, :columns]


@functools.cache
def int8_is_exact(device: torch.device) -> bool:
    """Whether `int8_matmul` is exact on a device: a CPU, or a CUDA device that multiplies integers.

    CPUs without VNNI may add pairs of products in 16 bits and saturate, which causes errors far beyond rounding. The
    first call for a device waits for it.
    """
    if device.type not in ("cpu", "cuda"):
        return False
    pairs = torch.tensor([[-128, -128], [-128, 127], [127, -128], [127, 127]], dtype=torch.int8)
    a = pairs.repeat(8, 32)  # [32, 64]: every pair of extremes is multiplied with every other pair
    # The expected product is computed on the CPU, because CUDA does not multiply matrices of wider integers.
    expected = a.long() @ a.t().long()
    there = a.to(device)
    try:
        found = int8_matmul(there, there.t().contiguous())
    except (RuntimeError, AttributeError):  # not available on this device
        return False
    return torch.equal(found.cpu().long(), expected)


@functools.cache
def int8_is_fast(device: torch.device) -> bool:
    """Whether `int8_matmul` is measured to be faster on a CPU than the product in float64; elsewhere True.

    Without VNNI, PyTorch (2.12) multiplies int8 in a plain loop: exact, and 10 to 20 times slower than float64.
    """
    if device.type != "cpu":
        return True
    a, b = torch.ones(128, 256, dtype=torch.int8), torch.ones(256, 128, dtype=torch.int8)
    return _seconds(lambda: int8_matmul(a, b)) < _seconds(lambda: a.double() @ b.double())


def _seconds(compute: Callable[[], Tensor]) -> float:
    """Return the least of three times: the first includes one-time setup, and other programs may slow any of them."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        compute()
        times.append(time.perf_counter() - start)
    return min(times)
