"""Reconstruction errors: how far a unit's quantized output is from its float output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``objective(output, target, rows)``: output and target [n, C, …] of the samples numbered ``rows`` [n]."""


def lp_error(p: float = 2.0) -> Objective:
    """Σ over channels of |output − target|^p, averaged over the rest (BRECQ)."""

    def objective(output: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        return (output - target).abs().pow(p).sum(dim=1).mean()

    return objective


def penalised_outside(objective: Objective, weight: float) -> Objective:
    """Add weight · Σ|target − output| over the targets that lie outside the range of the outputs (MoDiff)."""
    if weight == 0:
        return objective

    def penalised(output: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        low, high = torch.aminmax(output.detach())
        outside = (target < low) | (target > high)
        return objective(output, target, rows) + weight * ((target - output).abs() * outside).sum()

    return penalised


def fisher_error(gradients: Tensor) -> Objective:
    """Squared error weighted by the diagonal of the Fisher information (Li et al., 2021, eq. 10).

    Args:
        gradients: gradient of the network's loss with respect to the unit's output, [N, C, …] for all N samples.
            Their squares are divided by their mean, so that the balance with the rounding regulariser stays what it
            is for the plain squared error.
    """
    mean_square = gradients.square().mean().clamp(min=torch.finfo(torch.float32).tiny)

    def objective(output: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        weight = gradients[rows].to(output.device).square() / mean_square
        return ((output - target).square() * weight).sum(dim=1).mean()

    return objective
