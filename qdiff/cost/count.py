"""The cost of a network, per layer and in total; `qdiff.cost.account` counts it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from qdiff.config import FLOAT_BITS

# Fields that only modulated layers have.
_OF_MODULATION = ("first_act_bits", "state_bytes", "additions")


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer, of one matrix product of attention, or of the parameters that a module holds itself.

    Attributes:
        name: dotted path in the float network. An attention has two entries, ``NAME.qk`` for q·kᵀ and ``NAME.wv`` for
            softmax·v; a layer split into slices of different widths has one per slice, ``NAME[0]`` and ``NAME[1]``.
        kind: ``Conv1d``, ``Conv2d``, ``Linear``, ``Attention``, or the class of another module with parameters.
        parameters: number of weights and biases, without δ and z.
        size_bytes: their stored bytes, including δ and z of the weight and of the layer's inputs, the factors of its
            input channels, and its output for the first token.
        macs: multiply-accumulate operations per sample.
        weight_bits, act_bits: widths of the two factors: for q·kᵀ those of k and q, for softmax·v those of the
            softmax output and v, for a modulated layer those of a later call.
        first_act_bits: width of a modulated layer's input at the first call of a trajectory, which has no change to
            quantize; None if the layer does not modulate.
        state_bytes: bytes per sample that a modulated layer keeps from call to call: one input and one output, float32.
        additions: additions and subtractions per sample at a later call, besides the layer's product.
    """

    name: str
    kind: str
    parameters: int
    size_bytes: int
    macs: int = 0
    weight_bits: int = FLOAT_BITS
    act_bits: int = FLOAT_BITS
    first_act_bits: int | None = None
    state_bytes: int = 0
    additions: int = 0

    @property
    def modulates(self) -> bool:
        """Whether the layer modulates: its first call differs, and it has a state."""
        return self.first_act_bits is not None

    @property
    def bops(self) -> int:
        """Bit operations per sample: MACs · weight bits · activation bits."""
        return self.macs * self.weight_bits * self.act_bits

    @property
    def first_bops(self) -> int:
        """Bit operations per sample at the first call of a trajectory."""
        return self.macs * self.weight_bits * (self.first_act_bits if self.modulates else self.act_bits)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; those of modulation only if the layer modulates."""
        values = {**vars(self), "bops": self.bops}
        if self.modulates:
            return {**values, "first_bops": self.first_bops}
        return {k: v for k, v in values.items() if k not in _OF_MODULATION}


@dataclass(frozen=True)
class Account:
    """Cost of a network for one sample and one call, i.e. one step of a sampler without guidance.

    Attributes:
        layers: all costs in registration order; every parameter is in exactly one of them.
        image_shape: (C, H, W) of the network's input.
        context_shape: (L, D) of its context, or None.
    """

    layers: tuple[LayerCost, ...]
    image_shape: tuple[int, ...]
    context_shape: tuple[int, ...] | None = None

    @property
    def size_bytes(self) -> int:
        """Stored bytes of the network."""
        return sum(layer.size_bytes for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations of convolutions, linear layers and attention products."""
        return sum(layer.macs for layer in self.layers)

    @property
    def macs_by_layer(self) -> dict[str, int]:
        """MACs by a layer's name in the network."""
        return {layer.name: layer.macs for layer in self.layers}

    @property
    def bops(self) -> int:
        """Bit operations, summed over the layers; for a modulated network, those of a later call."""
        return sum(layer.bops for layer in self.layers)

    @property
    def first_bops(self) -> int:
        """Bit operations of the first call of a trajectory."""
        return sum(layer.first_bops for layer in self.layers)

    @property
    def modulates(self) -> bool:
        """Whether any layer modulates."""
        return any(layer.modulates for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes per sample that modulated layers keep from call to call."""
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def additions(self) -> int:
        """Additions of modulated layers per sample at a later call; not counted in MACs or BOPs."""
        return sum(layer.additions for layer in self.layers)

    def bops_over(self, calls: int) -> float:
        """Return the mean bit operations per call over a trajectory.

        Args:
            calls: how often the trajectory calls the network, at least 1; the first call counts as a first step.
        """
        if calls < 1:
            raise ValueError(f"a trajectory of {calls} calls has no mean; give 1 or more")
        return (self.first_bops + (calls - 1) * self.bops) / calls

    @property
    def gbops(self) -> float:
        """Bit operations / 10⁹."""
        return self.bops / 1e9

    def heaviest(self, count: int = 10, by: Literal["size", "bops", "state"] = "size") -> list[LayerCost]:
        """Return the ``count`` layers with the largest size, bit operations or state, largest first."""
        key = {"size": "size_bytes", "bops": "bops", "state": "state_bytes"}[by]
        return sorted(self.layers, key=attrgetter(key), reverse=True)[:count]

    def summary(self, calls: int | None = None) -> dict[str, Any]:
        """Return the totals, and the shapes they were counted for, as JSON values.

        Args:
            calls: network calls per trajectory. Only modulated networks depend on it: their ``bops`` are the mean over
                these calls, including the first; without ``calls`` they are those of a later call. Modulated networks
                also have ``first_bops``, ``calls``, ``state_bytes`` and ``additions``.
        """
        values = {
            "size_bytes": self.size_bytes,
            "parameters": self.parameters,
            "macs": self.macs,
            "bops": self.bops,
            "image_shape": list(self.image_shape),
            "context_shape": None if self.context_shape is None else list(self.context_shape),
            "batch": 1,
        }
        if self.modulates:
            if calls is not None:
                values["bops"] = self.bops_over(calls)
            values |= {"first_bops": self.first_bops, "calls": calls}
            values |= {"state_bytes": self.state_bytes, "additions": self.additions}
        return values
