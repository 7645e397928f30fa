"""Inputs of the networks that the deployment tests export."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 4  # of the digits model's sampler


def network_inputs(
    image: tuple[int, ...], context: tuple[int, ...] | None = None
) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Return ``inputs(count, seed)`` for a network; timesteps are spread over all 1000."""

    def made(count: int, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(count, *image, generator=generator)
        t = torch.arange(count) * (1000 // count) + seed
        return (x, t) if context is None else (x, t, torch.randn(count, *context, generator=generator))

    return made
