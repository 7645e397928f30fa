"""A pipeline's network as the commands call networks: ``network(x, t)`` or ``network(x, t, context)``."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.diffusers_backend.denoiser import DenoiserCall
from qdiff.diffusers_backend.structure import ends_of, mark_concatenations, middle_of
from qdiff.errors import UserError
from qdiff.interface import Family


@dataclass(frozen=True)
class Conditions:
    """All conditions of a sample in one row, so that recordings and runtimes know one context.

    Attributes:
        shapes: of each condition of one sample.
        dtypes: of each condition.
    """

    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, conditions: tuple[Tensor, ...]) -> Conditions:
        return cls(tuple(c.shape[1:] for c in conditions), tuple(c.dtype for c in conditions))

    @property
    def size(self) -> int:
        """Numbers per sample."""
        return sum(shape.numel() for shape in self.shapes)

    def join(self, conditions: tuple[Tensor, ...]) -> Tensor:
        """Return conditions [N, …] as one context [N, 1, size], float32; integers up to 2^24 are exact."""
        return torch.cat([c.reshape(len(c), -1).float() for c in conditions], dim=1).unsqueeze(1)

    def split(self, context: Tensor) -> list[Tensor]:
        """Undo `join`; conditions that were floats keep the context's dtype."""
        parts = context.flatten(1).split([shape.numel() for shape in self.shapes], dim=1)
        return [
            part.reshape(-1, *shape) if dtype.is_floating_point else part.reshape(-1, *shape).to(dtype)
            for part, shape, dtype in zip(parts, self.shapes, self.dtypes, strict=True)
        ]


class Denoiser(nn.Module):
    """A pipeline's network with all its conditions in one context.

    ``denoiser(x, t)`` or ``denoiser(x, t, context)``: x [N, …], t [N], context [N, 1, size].

    Args:
        network: the component.

    Attributes:
        call: how the pipeline called it last; set before the first use.
        conditions: the conditions of that call.
    """

    call: DenoiserCall
    conditions: Conditions

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._shape: torch.Size = torch.Size()
        ends, middle = ends_of(network), middle_of(network)
        self.family = Family(
            Denoiser,
            ends=None if ends is None else tuple(f"network.{name}" for name in ends),
            middle=None if middle is None else f"network.{middle}",
            prefix="network.",
        )
        with contextlib.suppress(UserError):  # a network that has no such up blocks is not split
            mark_concatenations(network)

    def describe(self, call: DenoiserCall, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Take over how the pipeline calls the network now, and return the inputs as (x, t, context or None)."""
        x, t, *conditions = inputs
        self.call, self.conditions, self._shape = call, Conditions.of(tuple(conditions)), x.shape[1:]
        self._time = t.dtype
        return x, t, self.conditions.join(tuple(conditions)) if conditions else None

    def as_called(self) -> Denoiser:
        """Return this network with the way in which the pipeline calls it now; both share all modules."""
        return copy.copy(self)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self._shape)

    @property
    def context_shape(self) -> tuple[int, int] | None:
        return (1, self.conditions.size) if self.conditions.shapes else None

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Return inputs of two samples, zeros, by which `QuantModel` finds attention and unused layers."""
        like = next(self.network.parameters())
        device = like.device
        x, t = torch.zeros(2, *self._shape, device=device), torch.zeros(2, dtype=self._time, device=device)
        if self.context_shape is None:
            return x, t
        return x, t, torch.zeros(2, *self.context_shape, device=device)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        conditions = () if context is None else self.conditions.split(context.to(x.dtype))
        return self.call(self.network, x, t.to(self._time), *conditions)
