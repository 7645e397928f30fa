"""What a modulated layer carries from one step of a sampling trajectory to the next (MoDiff, Gao et al., ICML 2025)."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerMemory:
    """The reconstruction of a layer's input so far, and the output that belongs to it.

    With â and o of the step before, a step quantizes only the change of its input: Δ = Q(a − â), then â ← â + Δ and
    o ← o + W·Δ. What quantization loses of a change is part of the next one, so errors do not add up.

    Args:
        name: of the layer, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self.input is None

    def begin(self, x: Tensor, output: Tensor) -> Tensor:
        """Remember the first step, and return its output."""
        if torch.is_grad_enabled() and (x.requires_grad or output.requires_grad):
            raise RuntimeError(f"modulation has no gradients; run {self.name} under torch.no_grad()")
        self.input, self.output = x, output
        return output

    def difference(self, x: Tensor) -> Tensor:
        """Return a − â.

        Raises:
            RuntimeError: a batch of another shape: broadcasting would mix two trajectories without a word.
        """
        if x.shape != self.input.shape:
            raise RuntimeError(
                f"{self.name} met a batch of shape {list(x.shape)} in a trajectory of {list(self.input.shape)}; open a "
                "new trajectory for a new batch"
            )
        return x - self.input

    def advance(self, change: Tensor, output_change: Tensor) -> Tensor:
        """Add a quantized change and its output, and return the output."""
        # New tensors: what was returned the step before may still be in use.
        self.input, self.output = self.input + change, self.output + output_change
        return self.output

    @property
    def bytes(self) -> int:
        """What is remembered takes."""
        return sum(t.numel() * t.element_size() for t in (self.input, self.output) if t is not None)
