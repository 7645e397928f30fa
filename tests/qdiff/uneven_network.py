"""Channels of different size in front of shortcuts, so that some take finer step sizes."""

from __future__ import annotations

import torch
from small_network import Small
from torch import nn

from qdiff.interface import split_input


class WithShortcut(Small):
    """The small network, whose layer on a concatenation is the convolution of a shortcut by its name."""

    def __init__(self):
        super().__init__()
        self.join = nn.Sequential()
        self.join.nin_shortcut = split_input(nn.Conv2d(16, 8, 3, padding=1), 8)


@torch.no_grad()
def uneven(network: nn.Module) -> nn.Module:
    """Scale the channels that a network's first layers give, which its last shortcut takes, by 1 to 1/16 each."""
    for layer in (network.conv_in, getattr(network, "embed", None)):
        if layer is not None:
            factors = 2.0 ** -(torch.arange(len(layer.weight)) % 5).to(layer.weight)
            layer.weight.mul_(factors.view(-1, *[1] * (layer.weight.dim() - 1)))
            layer.bias.mul_(factors)
    return network


def uneven_small() -> nn.Module:
    """A network with fixed weights whose layer ``join.nin_shortcut`` takes 8 even and 8 uneven channels."""
    torch.manual_seed(0)
    return uneven(WithShortcut().eval())
