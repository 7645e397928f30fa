"""The transformer blocks with which the latent UNet reads its condition, with the released parameter names.

Source: Rombach et al. 2022, section 3.3 and appendix E.2.1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import Checkpointed, zero_module
from qdiff.interface import AttentionCore, State, Step


class GEGLU(nn.Module):
    """x·W_1 gated by GELU(x·W_2) (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """[N, L, dim] → [N, L, dim] with a hidden width of four times dim."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, dim * 4), nn.Dropout(dropout), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CrossAttention(nn.Module):
    """Attention of tokens to a context, or to themselves without one.

    Args:
        query_dim: width of the tokens.
        context_dim: width of the context.
        heads, dim_head: number of heads and width of each head.
    """

    def __init__(self, query_dim: int, context_dim: int, heads: int, dim_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * dim_head
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.core = AttentionCore()
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [N, L, query_dim], context [N, S, context_dim] → [N, L, query_dim]."""
        context = x if context is None else context
        q, k, v = (
            rearrange(part, "n l (heads d) -> n heads l d", heads=self.heads)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(self.core(q, k, v), "n heads l d -> n l (heads d)"))


class BasicTransformerBlock(Checkpointed):
    """Self-attention, cross-attention and a feed-forward layer, each with a norm before it and a residual."""

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        context_dim: int | None,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(use_checkpoint)
        self.attn1 = CrossAttention(dim, dim, heads, dim_head, dropout)
        self.ff = FeedForward(dim, dropout)
        self.attn2 = CrossAttention(dim, context_dim or dim, heads, dim_head, dropout)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def compute(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [N, L, dim], context [N, S, context_dim] → [N, L, dim]."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual connection.

    It runs as steps of the UNet (`steps`), so that reconstruction can take one transformer block at a time.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        dim_head: int,
        depth: int = 1,
        context_dim: int | None = None,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, heads, dim_head, context_dim, dropout, use_checkpoint) for _ in range(depth)
        )
        self.proj_out = zero_module(nn.Conv2d(inner, channels, 1))

    def steps(self, name: str) -> Iterator[Step]:
        """Yield the steps from state ``h`` [N, C, H, W] and ``context`` to the new ``h``."""
        yield Step(f"{name}.proj_in", self.proj_in, lambda s: (self.norm(s["h"]),), _to_tokens)
        for i, block in enumerate(self.transformer_blocks):
            yield Step(f"{name}.transformer_blocks.{i}", block, _tokens_and_context, _set_tokens)
        yield Step(f"{name}.proj_out", self.proj_out, _to_map, _add_to_h)


def _to_tokens(state: State, out: Tensor) -> None:
    state["tokens"] = rearrange(out, "n c h w -> n (h w) c")


def _tokens_and_context(state: State) -> tuple[Tensor, ...]:
    context = state["context"]
    return (state["tokens"],) if context is None else (state["tokens"], context)


def _set_tokens(state: State, out: Tensor) -> None:
    state["tokens"] = out


def _to_map(state: State) -> tuple[Tensor, ...]:
    # Contiguous, because the CPU's GroupNorm backward has crashed on channels-last memory from here (torch 2.12).
    h, w = state["h"].shape[2:]
    return (rearrange(state["tokens"], "n (h w) c -> n c h w", h=h, w=w).contiguous(),)


def _add_to_h(state: State, out: Tensor) -> None:
    state["h"] = state["h"] + out
    del state["tokens"]
