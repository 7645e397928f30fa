"""Attention whose four operands (q, k, softmax output, v) can be quantized."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdiff.config import QuantConfig
from qdiff.functional import at_least_single
from qdiff.interface import AttentionCore
from qdiff.quantizer import act_quantizer


class QuantAttention(nn.Module):
    """Replaces an `AttentionCore`: two explicit matmuls when quantized, the fused kernel otherwise.

    State: ``act_quantizer_{q,k,v,w}`` if activations have a width; w is the softmax output, which has its own width
    and is never negative.
    """

    def __init__(self, core: AttentionCore, config: QuantConfig) -> None:
        super().__init__()
        self.prescale, self.causal, self.scale = core.prescale, core.causal, core.scale
        if config.attention_widths is not None:
            bits, softmax_bits = config.attention_widths
            # Attention is not modulated: in a modulated network its operands have dynamic ranges.
            config = replace(config, act_dynamic=config.act_dynamic or config.modulate)
            for operand in "qkv":  # [N, heads, L, d]
                quantizer = act_quantizer(config, bits, config.act_symmetric, False, channel_dim=-1)
                self.add_module(f"act_quantizer_{operand}", quantizer)
            self.act_quantizer_w = act_quantizer(config, softmax_bits, False, True, channel_dim=-1)
        self.acts_quantized = False  # set by `qdiff.modes.leaf_modes`

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute what `AttentionCore.forward` computes, from the same arguments."""
        if not self.acts_quantized:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, scale=self.scale)
        q, k, scale = prescaled(q, k, self.prescale, self.scale)
        logits = self.act_quantizer_q(q) @ self.act_quantizer_k(k).transpose(-2, -1) * scale
        # Quantize before returning to half precision, which near 1 is coarser than a 16-bit quantizer.
        weights = self.act_quantizer_w(attention_weights(logits, mask, self.causal))
        return weights.to(v.dtype) @ self.act_quantizer_v(v)


def prescaled(q: Tensor, k: Tensor, prescale: bool, scale: float | None) -> tuple[Tensor, Tensor, float]:
    """Return q and k as they are quantized, and the scale of their product.

    Args:
        q, k: [N, heads, L, d] and [N, heads, S, d].
        prescale: scale q and k by the root of the scale each, instead of their product.
        scale: of the logits; None is 1/√d.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q * scale**0.5, k * scale**0.5, 1.0) if prescale else (q, k, scale)


def attention_weights(logits: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return the softmax of logits [N, heads, L, S], at least in float32; keys that a query does not see get 0.

    Args:
        mask, causal: see `AttentionCore`.
    """
    if mask is not None or causal:
        logits = _masked(logits, mask, causal)
    weights = F.softmax(at_least_single(logits), dim=-1)
    if mask is not None:  # a query that sees no key attends to nothing, as in the fused kernel
        weights = weights.masked_fill(logits.isneginf().all(dim=-1, keepdim=True), 0)
    return weights


def _masked(logits: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return logits [N, heads, L, S] in which masked keys are −∞, so that their softmax is 0 at any width."""
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~seen, -torch.inf)
    if mask is None:
        return logits
    return logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
