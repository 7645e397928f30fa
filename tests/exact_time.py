"""A timestep embedding for diffusers' networks in the network's precision.

Theirs is always computed in float32, so outputs in float64 could not be compared more closely than to 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ExactTime(nn.Module):
    """Replaces ``time_proj``.

    Args:
        embedding: of our family, ``(t, dim, dtype)`` → [N, dim].
        dim: width of the embedding.
    """

    def __init__(self, embedding: Callable[[Tensor, int, torch.dtype], Tensor], dim: int) -> None:
        super().__init__()
        self.embedding, self.dim = embedding, dim

    def forward(self, t: Tensor) -> Tensor:
        return self.embedding(t, self.dim, torch.float64)
