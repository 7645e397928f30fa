"""Encoder and decoder of the first stages, with the parameter names of the released checkpoints.

Source: Esser et al. 2021, "Taming Transformers", and Rombach et al. 2022, "High-Resolution Image Synthesis with Latent
Diffusion Models", appendix G. They use the blocks of the DDPM UNet without a time embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ddim.models.layers import AttnBlock, Downsample, ResnetBlock, Upsample, group_norm


def _middle(channels: int, dropout: float) -> nn.Module:
    mid = nn.Module()
    mid.block_1 = ResnetBlock(channels, channels, None, dropout)
    mid.attn_1 = AttnBlock(channels)
    mid.block_2 = ResnetBlock(channels, channels, None, dropout)
    return mid


def _run_middle(mid: nn.Module, h: Tensor) -> Tensor:
    # Attention may return channels-last memory, on which the CPU's GroupNorm backward has crashed (torch 2.12).
    return mid.block_2(mid.attn_1(mid.block_1(h)).contiguous())


def _level(channels: int, width: int, blocks: int, with_attention: bool, dropout: float) -> nn.Module:
    level = nn.Module()
    level.block, level.attn = nn.ModuleList(), nn.ModuleList()
    for _ in range(blocks):
        level.block.append(ResnetBlock(channels, width, None, dropout))
        channels = width
        if with_attention:
            level.attn.append(AttnBlock(channels))
    return level


def _run_level(level: nn.Module, h: Tensor) -> Tensor:
    for j, block in enumerate(level.block):
        h = block(h)
        if level.attn:
            h = level.attn[j](h).contiguous()
    return h


class Encoder(nn.Module):
    """Image [N, in_channels, H, W] → [N, z_channels (twice with double_z), H/f, W/f] with f = 2^(levels − 1).

    Args:
        ch: width of the first level.
        ch_mult: width factors of the levels.
        attn_resolutions: image sides at which attention follows every block, for images of ``resolution``.
        double_z: whether to predict a log variance too.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        dropout: float = 0.0,
        out_ch: int | None = None,  # used by the decoder, which shares the config
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = ch
        for i, factor in enumerate(ch_mult):
            level = _level(channels, ch * factor, num_res_blocks, resolution in attn_resolutions, dropout)
            channels = ch * factor
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(channels, with_conv=True)
                resolution //= 2
            self.down.append(level)
        self.mid = _middle(channels, dropout)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, z_channels * (2 if double_z else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = _run_level(level, h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = _run_middle(self.mid, h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latent [N, z_channels, h, w] → image [N, out_ch, h·f, w·f]; arguments as for `Encoder`."""

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        out_ch: int,
        resolution: int,
        z_channels: int,
        dropout: float = 0.0,
        in_channels: int | None = None,  # used by the encoder, as is double_z
        double_z: bool = True,
    ) -> None:
        super().__init__()
        channels = ch * ch_mult[-1]
        resolution //= 2 ** (len(ch_mult) - 1)
        self.conv_in = nn.Conv2d(z_channels, channels, 3, padding=1)
        self.mid = _middle(channels, dropout)
        levels = []
        for i, factor in reversed(list(enumerate(ch_mult))):
            level = _level(channels, ch * factor, num_res_blocks + 1, resolution in attn_resolutions, dropout)
            channels = ch * factor
            if i > 0:
                level.upsample = Upsample(channels, with_conv=True)
                resolution *= 2
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = _run_middle(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            h = _run_level(level, h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
