"""The arithmetic of uniform affine quantization: pure functions, no state.

Every quantizer here is unsigned and affine: x ≈ δ·(q − z) with integers q in [0, 2^b − 1]. A symmetric signed
quantizer (z = 0, integers in [−2^(b−1), 2^(b−1) − 1]) is the same map with z = 2^(b−1), so there is no second case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.kernels.switch import runs_fused

MOST_SHIFT = 3  # a channel's step size is at least 2^-3 of its tensor's (DMQ)


def max_level(bits: int) -> int:
    """Return 2^b − 1, the largest integer of a b-bit quantizer."""
    return 2**bits - 1


def at_least_single(x: Tensor) -> Tensor:
    """Return x in float32 if it is in half precision, else x itself.

    float16 cannot represent all integers above 2,048 (2^16 − 1 is infinite there), and below that x/δ is rounded twice.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def quantize(x: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return clamp(round(x/δ) + z, 0, 2^b − 1) in x's dtype or at least float32; δ and z broadcast against x."""
    return (torch.round(at_least_single(x) / delta) + zero_point).clamp_(0, max_level(bits))


def dequantize(q: Tensor, delta: Tensor, zero_point: Tensor) -> Tensor:
    """Return δ·(q − z) in δ's dtype."""
    return (q.to(delta.dtype) - zero_point) * delta


def finer(delta: Tensor, shifts: Tensor | None) -> Tensor:
    """Return δ/2^k, which is exact; k is uint8 and broadcasts against δ, None for 0."""
    return delta if shifts is None else delta / (1 << shifts)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through rounding with the gradient of the step size (Esser et al., 2020, eq. 3)."""

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        y = fake_quantize_inference(x, delta, zero_point, bits)
        ctx.save_for_backward(x, y, delta, zero_point)
        ctx.bits = bits
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, delta, zero_point = ctx.saved_tensors
        # "Inside" means not clamped: −½ ≤ x/δ + z ≤ 2^b − ½.
        low = (-0.5 - zero_point) * delta
        high = (max_level(ctx.bits) + 0.5 - zero_point) * delta
        inside = (x >= low) & (x <= high)
        grad_delta = None
        if ctx.needs_input_grad[1]:
            # dy/dδ = (y − x)/δ inside and y/δ = q − z where clamped.
            grad_delta = (grad * (y - x * inside)).sum_to_size(delta.shape) / delta
        return (grad * inside if ctx.needs_input_grad[0] else None), grad_delta, None, None


def fake_quantize(x: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize, differentiable in x (straight-through) and in δ.

    Args:
        x: any shape.
        delta, zero_point: δ > 0 and z, broadcastable against x.
        bits: width b.
    """
    return _FakeQuantize.apply(x, delta, zero_point, bits)


def fake_quantize_inference(x: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the values of `fake_quantize` without gradients, computed in at least float32, in x's dtype.

    PyTorch's fused kernel is not used: it multiplies by 1/δ, so values on a rounding boundary may round differently,
    and on the CPU these in-place operations take a third of its time.
    """
    if runs_fused(x, delta):
        return torch.ops.qdiff.fake_quantize(x, delta, zero_point, bits)
    q = (at_least_single(x) / delta).round_().add_(zero_point).clamp_(0, max_level(bits))
    return q.sub_(zero_point).mul_(delta).to(x.dtype)
