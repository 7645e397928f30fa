"""The arithmetic of uniform affine quantization: pure functions, no state.

Every quantizer here is unsigned and affine: x ≈ δ·(q − z) with integers q in [0, 2^b − 1]. A symmetric signed
quantizer (z = 0, integers in [−2^(b−1), 2^(b−1) − 1]) is the same map with z = 2^(b−1), so there is no second case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.kernels.switch import runs_fused

PRODUCTS_AT_A_TIME = 1 << 20


def max_level(bits: int) -> int:
    """Return 2^b − 1, the largest integer of a b-bit quantizer."""
    return 2**bits - 1


def quantize(x: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return clamp(round(x/δ) + z, 0, 2^b − 1), in x's dtype; δ and z broadcast against x."""
    return (torch.round(x / delta) + zero_point).clamp_(0, max_level(bits))


def dequantize(q: Tensor, delta: Tensor, zero_point: Tensor) -> Tensor:
    """Return δ·(q − z) in δ's dtype."""
    return (q.to(delta.dtype) - zero_point) * delta


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
        # Inside means that rounding did not clamp: −½ ≤ x/δ + z ≤ 2^b − ½.
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
    """The same values as `fake_quantize`, without gradients.

    PyTorch's fused kernel is not used: it multiplies by 1/δ, so values on a rounding edge land elsewhere, and on
    the CPU these in-place steps take a third of its time.
    """
    if runs_fused(x, delta):
        return torch.ops.qdiff.fake_quantize(x, delta, zero_point, bits)
    q = (x / delta).round_().add_(zero_point).clamp_(0, max_level(bits))
    return q.sub_(zero_point).mul_(delta)


def linear_in_fixed_order(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b with every sum in the same order, whatever the batch size and whoever made the CPU.

    Matrix libraries choose the order by both, and a value that lies on a rounding edge of the next quantizer then falls
    to one side here and to the other there: in the published Stable Diffusion test case MKL's paths for Intel and for
    other CPUs differ by 0.85 % for one such value behind the time embedding. For the few rows of an embedding it
    costs nothing.

    Args:
        x: [N, in].
        weight: [out, in]; bias: [out].

    Returns:
        [N, out].
    """
    at_a_time = max(1, PRODUCTS_AT_A_TIME // weight.numel())
    out = torch.cat([(part[:, None, :] * weight).sum(dim=-1) for part in x.split(at_a_time)])
    return out if bias is None else out + bias
