"""What a modulated layer carries from one step of a sampling trajectory to the next (MoDiff, Gao et al., ICML 2025)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from qdiff.functional import at_least_single


class LayerMemory:
    """The reconstruction of a layer's input so far, and the output that belongs to it.

    With â and o of the step before, a step quantizes only the change of its input: Δ = Q(a − â), then â ← â + Δ and
    o ← o + W·Δ. What quantization loses of a change is part of the next one, so errors do not add up.

    Args:
        name: of the layer, for errors.
        compensates: False forgets what quantization lost, as if â were a: errors then add up (an ablation).
    """

    def __init__(self, name: str, compensates: bool = True) -> None:
        self.name, self.compensates = name, compensates
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self.input is None

    def begin(self, x: Tensor, output: Tensor) -> Tensor:
        """Remember the first step, and return its output."""
        if torch.is_grad_enabled() and (x.requires_grad or output.requires_grad):
            raise RuntimeError(f"modulation has no gradients; run {self.name} under torch.no_grad()")
        # In float32 at least: under autocast, hundreds of half-precision additions would show. The input is copied: it
        # may be the sampler's own x.
        self.input, self.output = at_least_single(x).clone(), at_least_single(output)
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

    def advance(self, x: Tensor, change: Tensor, output_change: Tensor) -> Tensor:
        """Add the quantized change of the input to ``x``, and its output; return the output."""
        # New tensors: what was returned the step before may still be in use.
        self.input = self.input + change if self.compensates else at_least_single(x)
        self.output = self.output + output_change
        return self.output.to(output_change.dtype)

    def clear(self) -> None:
        """Forget everything: the next step is a first one."""
        self.input = self.output = None

    @property
    def bytes(self) -> int:
        """Bytes held by the remembered input and output."""
        return sum(t.numel() * t.element_size() for t in (self.input, self.output) if t is not None)


class Modulated(Protocol):
    """A layer that remembers, while its memory is there."""

    memory: LayerMemory | None
    modulates: bool


@contextlib.contextmanager
def memories(layers: Mapping[str, Modulated], compensates: bool = True) -> Iterator[None]:
    """Let the layers that modulate remember inside the block; what they remember is given up at its end.

    Args:
        layers: by name.
        compensates: see `LayerMemory`.

    Raises:
        RuntimeError: one of them is in such a block already.
    """
    modulating = {name: layer for name, layer in layers.items() if layer.modulates}
    if any(layer.memory is not None for layer in modulating.values()):
        raise RuntimeError("a trajectory is open already; close it before the next batch")
    try:
        for name, layer in modulating.items():
            layer.memory = LayerMemory(name, compensates)
        yield
    finally:
        for layer in modulating.values():
            layer.memory = None
