"""The blocks of the DDPM UNet (Ho et al., 2020), with the parameter names of the released checkpoints."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qdiff.interface import AttentionCore, split_input


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al., 2017; frequencies as in DDPM).

    Args:
        t: [N], integer or fractional timesteps.
        dim: width of the embedding.
        dtype: dtype of the embedding; angles are computed in at least float32.

    Returns:
        [N, dim]: sines, then cosines, of t·10000^(−i/(dim/2−1)).
    """
    half, exact = dim // 2, torch.promote_types(dtype, torch.float32)
    frequencies = torch.exp(torch.arange(half, dtype=exact, device=t.device) * (-math.log(10000.0) / (half - 1)))
    angles = t.to(exact)[:, None] * frequencies[None, :]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2)).to(dtype)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Residual block: norm–SiLU–conv twice, with the time embedding added in between.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        temb_channels: width of the time embedding; None for a block without one (autoencoders).
        dropout: probability of dropping before the second convolution.
        split_at: channels of h if the input is concat(h, skip), else None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None,
        dropout: float,
        split_at: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = None if temb_channels is None else nn.Linear(temb_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = None
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
            if split_at is not None:
                split_input(self.nin_shortcut, split_at)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x [N, in_channels, H, W], temb [N, temb_channels] → [N, out_channels, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        if self.temb_proj is not None:
            h = h + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.core = AttentionCore()
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, H, W]."""
        normed = self.norm(x)
        q, k, v = (
            # The one head has all channels.
            rearrange(projection(normed), "n c h w -> n 1 (h w) c")
            for projection in (self.q, self.k, self.v)
        )
        out = rearrange(self.core(q, k, v), "n 1 (h w) c -> n c h w", h=x.shape[2])
        return x + self.proj_out(out)


class Downsample(nn.Module):
    """Halve the resolution: a strided convolution padded at the lower right, or average pooling."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, H/2, W/2]."""
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution by repeating pixels, then convolve."""

    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, 2H, 2W]."""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)
