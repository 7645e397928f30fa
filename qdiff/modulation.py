"""The state of a modulated layer from one step of a sampling trajectory to the next (MoDiff, Gao et al., ICML 2025)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from qdiff.functional import at_least_single


class LayerMemory:
    """The reconstruction â of a layer's input, and the output o that belongs to it.

    Given â and o of the previous step, a step quantizes only the change of its input: Δ = Q(a − â), then â ← â + Δ and
    o ← o + W·Δ. The quantization error of a change becomes part of the next change, so errors do not add up.

    Args:
        name: name of the layer, for errors.
        compensates: False stores a instead of â, which drops the quantization error: errors then add up (an ablation).
    """

    def __init__(self, name: str, compensates: bool = True) -> None:
        self.name, self.compensates = name, compensates
        self.input: Tensor | None = None
        self.output: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self.input is None

    def begin(self, x: Tensor, output: Tensor) -> Tensor:
        """Store the first step's input and output, and return the output."""
        if torch.is_grad_enabled() and (x.requires_grad or output.requires_grad):
            raise RuntimeError(f"modulation has no gradients; run {self.name} under torch.no_grad()")
        # At least float32: under autocast, the errors of hundreds of half-precision additions would become visible. The
        # input is copied because it may be the sampler's own x.
        self.input, self.output = at_least_single(x).clone(), at_least_single(output)
        return output

    def difference(self, x: Tensor) -> Tensor:
        """Return a − â.

        Raises:
            RuntimeError: the batch has another shape; broadcasting would silently mix two trajectories.
        """
        if x.shape != self.input.shape:
            raise RuntimeError(
                f"{self.name} got a batch of shape {list(x.shape)} in a trajectory of shape {list(self.input.shape)}; "
                "open a new trajectory for a new batch"
            )
        return x - self.input

    def advance(self, x: Tensor, change: Tensor, output_change: Tensor) -> Tensor:
        """Add the quantized change of the input and the change of the output to the state; return the output.

        Args:
            x: the input of this step, which the ablation stores.
            change: quantized change of the input.
            output_change: output for that change.
        """
        # Not in place: the output returned at the previous step may still be in use.
        self.input = self.input + change if self.compensates else at_least_single(x)
        self.output = self.output + output_change
        return self.output.to(output_change.dtype)

    def clear(self) -> None:
        """Drop the state, so that the next step is a first one."""
        self.input = self.output = None

    @property
    def bytes(self) -> int:
        """Bytes held by the remembered input and output."""
        return sum(t.numel() * t.element_size() for t in (self.input, self.output) if t is not None)


class Modulated(Protocol):
    """A layer that modulates while its ``memory`` is not None."""

    memory: LayerMemory | None
    modulates: bool


@contextlib.contextmanager
def memories(layers: Mapping[str, Modulated], compensates: bool = True) -> Iterator[None]:
    """Give the layers that modulate a memory inside the block; it is dropped at the end.

    Args:
        layers: layers by name.
        compensates: see `LayerMemory`.

    Raises:
        RuntimeError: a layer already has a memory.
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
