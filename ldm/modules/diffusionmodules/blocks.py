"""The convolutional and attention blocks of the latent UNet, with the parameter names of the released checkpoints.

Source: Dhariwal & Nichol 2021, "Diffusion Models Beat GANs", whose architecture Rombach et al. 2022 use.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import Checkpointed, normalization, zero_module
from qdiff.interface import AttentionCore, split_input


class Upsample(nn.Module):
    """[N, C, H, W] → [N, C, 2H, 2W]: repeat pixels, then convolve if ``use_conv``."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """[N, C, H, W] → [N, C, H/2, W/2]: a strided convolution, or average pooling."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(Checkpointed):
    """Residual block of two convolutions with the time embedding in between.

    Args:
        channels, out_channels: channels of input and output.
        emb_channels: width of the time embedding.
        use_scale_shift_norm: the embedding scales and shifts the second norm's output instead of being added.
        resample: ``up`` or ``down`` changes the resolution inside the block; None keeps it.
        split_at: channels of h if the input is concat(h, skip), else None.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        *,
        use_scale_shift_norm: bool = False,
        resample: str | None = None,
        split_at: int | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(use_checkpoint)
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        samplers = {"up": Upsample, "down": Downsample}
        self.resample = None if resample is None else samplers[resample](channels, use_conv=False)
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, out_channels * (2 if use_scale_shift_norm else 1))
        )
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity()
        if channels != out_channels:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)
            if split_at is not None:
                split_input(self.skip_connection, split_at)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [N, channels, H, W], emb [N, emb_channels] → [N, out_channels, H', W']."""
        norm, silu, conv = self.in_layers
        h = silu(norm(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = conv(h)
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


class AttentionBlock(Checkpointed):
    """Multi-head self-attention over all positions, added to its input.

    Args:
        heads: number of heads.
        new_order: order the channels of ``qkv`` as (q, k, v) × heads; the released models use heads × (q, k, v), False.
    """

    def __init__(self, channels: int, heads: int, new_order: bool = False, use_checkpoint: bool = False) -> None:
        super().__init__(use_checkpoint)
        self.heads, self.new_order = heads, new_order
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.attention = AttentionCore(prescale=True)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def compute(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C, H, W]."""
        shape, x = x.shape, x.flatten(2)
        order = "qkv heads d" if self.new_order else "heads qkv d"
        # Each [N, heads, positions, d], the layout of the core.
        q, k, v = rearrange(self.qkv(self.norm(x)), f"n ({order}) l -> qkv n heads l d", qkv=3, heads=self.heads)
        out = rearrange(self.attention(q, k, v), "n heads l d -> n (heads d) l")
        return (x + self.proj_out(out)).reshape(shape)
