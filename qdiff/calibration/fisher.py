"""Gradients of the network's output error with respect to a block's output."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from qdiff.calibration.walk import Walker, rows_of
from qdiff.interface import State, SteppedNetwork
from qdiff.modes import leaf_modes


def output_gradients(network: SteppedNetwork, index: int, state: State, final_target: Tensor, walker: Walker) -> Tensor:
    """Return ∂L/∂(output of step ``index``) for all samples, L = Σ(ε_quantized-up-to-here − ε_float)².

    Everything before the step is quantized as in ``state``, the step itself has rounded weights, and everything after
    it in execution order is float (Li et al., 2021, section 3.3).

    Args:
        state: the quantized state before the step.
        final_target: the float network's output [N, C, H, W].
    """
    steps = list(network.steps())

    def gradients(rows: slice) -> tuple[Tensor, ...]:
        # Later blocks read all skips, so all of them are moved.
        part = {
            k: v.to(walker.device) if isinstance(v, Tensor) else [s.to(walker.device) for s in v]
            for k, v in rows_of(state, rows).items()
        }
        step = steps[index]
        with torch.no_grad(), leaf_modes([step.module], weights=True, activations=False):
            output = step.module(*step.inputs(part))
        with torch.enable_grad():
            output.requires_grad_(True)
            step.output(part, output)
            for later in islice(steps, index + 1, None):
                later(part)
            loss = (part["h"] - final_target[rows].to(walker.device)).square().sum()
            return torch.autograd.grad(loss, output)

    with leaf_modes([network], weights=False, activations=False):
        return walker.map(gradients, len(state["x"]))[0]
