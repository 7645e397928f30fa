"""A network of a few thousand weights that has a layer of every kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qdiff.interface import split_input


class Small(nn.Module):
    """Convolutions with stride and groups, linear layers, attention and a shortcut; a few hundred weights per layer."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.embed = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(4, 8)
        self.block = nn.Sequential(nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1, groups=2))
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in "qkv")
        self.join = split_input(nn.Conv2d(16, 8, 3, padding=1), 8)
        self.conv_out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x, t):
        angles = t[:, None].to(x) * torch.tensor([0.001, 0.004, 0.016, 0.064]).to(x)
        skip = self.conv_in(x) + self.embed(angles.sin())[:, :, None, None]
        h = self.down(skip + self.block(skip))
        tokens = h.flatten(2).mT
        q, k, v = (layer(tokens)[:, None] for layer in (self.q, self.k, self.v))
        h = h + F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, h.shape[2:])
        h = torch.cat([F.interpolate(h, scale_factor=2), skip], dim=1)
        return self.conv_out(F.silu(self.join(h)))
