"""A network whose cost can be counted by hand."""

from __future__ import annotations

import torch
from torch import nn

from qdiff.cost import account as accounting
from qdiff.cost.count import LayerCost
from qdiff.interface import AttentionCore

TINY = (1, 8, 8)  # what `tiny_network` takes


class Toy(nn.Module):
    """One layer of each kind, on odd shapes: every number can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.linear = nn.Linear(8, 6, bias=False)
        self.conv1d = nn.Conv1d(6, 6, 1)
        self.core = AttentionCore()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        tokens = self.linear(self.norm(self.conv(x)).flatten(2).transpose(1, 2))
        tokens = self.conv1d(tokens.transpose(1, 2))  # [N, 6, 16]
        q = tokens.unflatten(1, (2, 3)).transpose(2, 3)  # [N, 2 heads, 16, 3]
        k, v = context.unflatten(2, (2, 7)).transpose(1, 2).split([3, 4], dim=-1)  # [N, 2, 5, 3] and [N, 2, 5, 4]
        return self.core(q, k, v)


TOY = ((4, 8, 8), (5, 14))


def by_name(counts: accounting.Account) -> dict[str, LayerCost]:
    return {layer.name: layer for layer in counts.layers}
