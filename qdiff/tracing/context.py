"""Which part of a network's inputs a layer reads: the context, tokens that the network passes on as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

CONDITIONS = 2  # index of the first condition among a network's inputs; x and t come before


@dataclass(frozen=True)
class Context:
    """Where a context [N, L, C] is in the inputs of a network: a part of each sample of one of them.

    Attributes:
        index: of the input.
        start: of the first token in a flattened sample.
        channels: C.
    """

    index: int
    start: int
    channels: int

    def first_tokens(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the first tokens of all samples, [N, C]."""
        return inputs[self.index].flatten(1)[:, self.start : self.start + self.channels]


def context_of(x: Tensor, inputs: Sequence[Tensor]) -> Context | None:
    """Return the context that a layer takes; None if it takes what the network has computed, or x or t.

    Args:
        x: the layer's input; a context if it is one of the network's inputs or a view of one, as tokens [1, L, C].
        inputs: (x, t, conditions…) that the network was called with, of one sample, none of them a view itself.
    """
    root = x if x._base is None else x._base
    index = next((i for i, given in enumerate(inputs) if i >= CONDITIONS and given is root), None)
    if index is None or x.dim() != 3 or x.stride(2) != 1:
        return None
    return Context(index, x.storage_offset(), x.shape[-1])
