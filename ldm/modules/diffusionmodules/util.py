"""Small parts of the latent UNet: timestep embedding, normalisation, zero initialisation, gradient checkpointing."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Module = TypeVar("Module", bound=nn.Module)


def timestep_embedding(t: Tensor, dim: int, dtype: torch.dtype, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of latent diffusion; unlike DDIM's, cosines come first and frequencies divide by dim/2.

    Args:
        t: [N], integer or fractional timesteps.
        dim: width of the embedding.
        dtype: dtype of the embedding; angles are computed in at least float32.

    Returns:
        [N, dim]: cosines, then sines, of t·max_period^(−i/(dim/2)).
    """
    half, exact = dim // 2, torch.promote_types(dtype, torch.float32)
    # In the released code's order: another one rounds differently unless dim is a power of 2, and t multiplies it.
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=exact, device=t.device) / half)
    angles = t.to(exact)[:, None] * frequencies[None, :]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2)).to(dtype)


def normalization(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def zero_module(module: Module) -> Module:
    """Zero a module's parameters, so the residual branch it ends initially adds nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Checkpointed(nn.Module):
    """A block that can recompute its activations in the backward pass instead of keeping them.

    Subclasses implement ``compute``. It is recomputed if ``use_checkpoint`` is set and gradients are enabled.
    """

    def __init__(self, use_checkpoint: bool) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint

    def compute(self, *inputs: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, *inputs: Tensor | None) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False)
        return self.compute(*inputs)
