"""Tiny networks of linear layers with random integers, step sizes and zero points, for the tests of weight formats."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.config import QuantConfig
from qdiff.interface import split_input
from qdiff.quant_model import QuantModel


class LinearNetwork(nn.Module):
    """Linear layers that fit every format, one of them split; beside them what is not quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 128)
        self.first = nn.Linear(128, 64)
        self.block = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128, bias=False))
        self.joined = split_input(nn.Linear(192, 8), 128)
        self.register_buffer("table", torch.arange(192) / 192)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 128] → [N, 8]."""
        h = self.first(x + self.embedding.weight[0])
        return self.joined(torch.cat([self.block(h), h], dim=1) + self.table)


class MisfitNetwork(nn.Module):
    """A linear layer that fits, and layers that do not fit any format at 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(64, 8, 1)
        self.fits = nn.Linear(64, 16)
        self.odd = nn.Linear(100, 16)
        self.joined = split_input(nn.Linear(128, 16), 32)


def random_weights(network: nn.Module, short_steps: bool = False, seed: int = 0, **config: object) -> QuantModel:
    """Wrap a network and give each layer random integers of all levels, step sizes around 0.01 and any zero points.

    Args:
        short_steps: δ has 8 significant bits, so that its products with integers of 4 bits are exact in float32.
    """
    torch.manual_seed(seed)
    qnn = QuantModel(network, QuantConfig(split_shortcut=True, **config))
    for layer in qnn.layers().values():
        for quantizer in layer.weight_quantizers:
            delta = torch.rand_like(quantizer.delta) * 0.01 + 0.005
            levels = 2**quantizer.bits
            zero_point = torch.randint(levels, quantizer.delta.shape)
            middle = torch.full_like(zero_point, levels // 2)
            quantizer.set(
                delta.bfloat16().float() if short_steps else delta, middle if quantizer.symmetric else zero_point
            )
        if len(layer.weight_quantizers):
            layer.set_weight_int(torch.randint(2**quantizer.bits, layer.weight.shape))
    return qnn


def weight_in_double(qnn: QuantModel, name: str) -> Tensor:
    """Return δ·(q − z) of a layer, float64 [C_out, C_in, …], computed element by element from what a layer holds."""
    layer = qnn.layers()[name]
    parts = zip(layer.weight_quantizers, layer.integers().split(layer.slices, 1), strict=True)
    return torch.cat([q.delta.double() * (part.double() - q.zero_point.double()) for q, part in parts], dim=1)
