"""Reconstruction errors: how far a unit's quantized output is from its float output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``objective(output, target, weight)``: all [n, C, …], for the same samples; weight is the unit's, or None."""


def lp_error(p: float = 2.0) -> Objective:
    """Σ over channels of |output − target|^p, averaged over the rest (BRECQ)."""

    def objective(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        return (output - target).abs().pow(p).sum(dim=1).mean()

    return objective


def penalised_outside(objective: Objective, factor: float) -> Objective:
    """Add factor · Σ|target − output| over the targets that lie outside the range of the outputs (MoDiff)."""
    if factor == 0:
        return objective

    def penalised(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        low, high = torch.aminmax(output.detach())
        outside = (target < low) | (target > high)
        return objective(output, target, weight) + factor * ((target - output).abs() * outside).sum()

    return penalised


def fisher_weights(gradients: Tensor) -> Tensor:
    """Turn gradients into the diagonal of the Fisher information (Li et al., 2021, eq. 10), in place.

    In place, because the gradients of a whole calibration set may fill the memory. The squares are divided by their
    mean to keep the balance between the error and the rounding regulariser as it is for the plain squared error.

    Args:
        gradients: gradient of the network's loss with respect to a unit's output, [N, C, …] for all N samples.

    Returns:
        ``gradients``, now the weights of the squared error.
    """
    squares = gradients.square_()
    return squares.div_(squares.mean().clamp(min=torch.finfo(torch.float32).tiny))


def weighted_error(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """Σ over channels of weight · (output − target)², averaged over the rest."""
    return ((output - target).square() * weight).sum(dim=1).mean()
