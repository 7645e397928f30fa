"""What a network costs, layer by layer and in sum; `qdiff.cost.account` counts it."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

FLOAT_BITS = 32
# What a layer that does not modulate has nothing of.
_OF_MODULATION = ("first_act_bits", "state_bytes", "additions")


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer, of one matrix product of an attention, or of the parameters that a module holds itself.

    Attributes:
        name: dotted path in the float network. An attention has two entries, ``NAME.qk`` for q·kᵀ and ``NAME.wv`` for
            softmax·v; a layer split into slices of different widths one a slice, ``NAME[0]`` and ``NAME[1]``.
        kind: ``Conv1d``, ``Conv2d``, ``Linear``, ``Attention``, or the class of another module with parameters.
        parameters: how many weights and biases, δ and z not counted.
        size_bytes: what they take as stored, δ and z of the weight and of the layer's inputs included.
        macs: multiply-accumulate operations of one sample.
        weight_bits, act_bits: widths of the two factors. Of q·kᵀ they are those of k and q, of softmax·v those of the
            softmax output and v. Of a modulated layer they are those of a later call.
        first_act_bits: width of a modulated layer's input at the first call of a trajectory, which has no change to
            quantize; None where the layer does not modulate.
        state_bytes: what a modulated layer keeps from call to call for one sample: one input and one output, float32.
        additions: what it adds and subtracts beside its product at a later call, for one sample.
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
        """Whether the layer has another first call, and a state."""
        return self.first_act_bits is not None

    @property
    def bops(self) -> int:
        """Bit operations of one sample: MACs · weight bits · activation bits."""
        return self.macs * self.weight_bits * self.act_bits

    @property
    def first_bops(self) -> int:
        """The same at the first call of a trajectory."""
        return self.macs * self.weight_bits * (self.first_act_bits if self.modulates else self.act_bits)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON; those of modulation only where the layer modulates."""
        values = {**vars(self), "bops": self.bops}
        if self.modulates:
            return {**values, "first_bops": self.first_bops}
        return {k: v for k, v in values.items() if k not in _OF_MODULATION}


@dataclass(frozen=True)
class Account:
    """Cost of a network for one sample and one call, i.e. one step of a sampler without guidance.

    Attributes:
        layers: in registration order; every parameter is in exactly one of them.
        image_shape: (C, H, W) of the network's input.
        context_shape: (L, D) of its context, or None.
    """

    layers: tuple[LayerCost, ...]
    image_shape: tuple[int, ...]
    context_shape: tuple[int, ...] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the network as stored."""
        return sum(layer.size_bytes for layer in self.layers)

    @property
    def parameters(self) -> int:
        """How many weights and biases."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulate operations of convolutions, linear layers and attention products."""
        return sum(layer.macs for layer in self.layers)

    @property
    def bops(self) -> int:
        """Bit operations, summed over the layers; of a modulated network those of a later call."""
        return sum(layer.bops for layer in self.layers)

    @property
    def first_bops(self) -> int:
        """Bit operations of the first call of a trajectory."""
        return sum(layer.first_bops for layer in self.layers)

    @property
    def modulates(self) -> bool:
        """Whether any layer does."""
        return any(layer.modulates for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes that modulated layers keep from call to call, for one sample."""
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def additions(self) -> int:
        """Additions of modulated layers at a later call, for one sample; no MACs, and not among the BOPs."""
        return sum(layer.additions for layer in self.layers)

    def bops_over(self, calls: int) -> float:
        """Return the mean bit operations of one call over a trajectory.

        Args:
            calls: how often the trajectory calls the network, 1 or more; the first call is a first step.
        """
        if calls < 1:
            raise ValueError(f"a trajectory of {calls} calls has no mean; give 1 or more")
        return (self.first_bops + (calls - 1) * self.bops) / calls

    @property
    def gbops(self) -> float:
        """Bit operations / 10⁹."""
        return self.bops / 1e9

    def heaviest(self, count: int = 10, by: Literal["size", "bops", "state"] = "size") -> list[LayerCost]:
        """Return the ``count`` layers of largest size or most bit operations, largest first."""
        key = {"size": "size_bytes", "bops": "bops", "state": "state_bytes"}[by]
        return sorted(self.layers, key=attrgetter(key), reverse=True)[:count]

    def summary(self, calls: int | None = None) -> dict[str, Any]:
        """Return the totals and what they were counted for, for JSON.

        Args:
            calls: of the network in one trajectory. Only modulated networks differ by it: their ``bops`` are then the
                mean over these calls, the first included, and without it those of a later call. They also have
                ``first_bops``, ``calls``, ``state_bytes`` and ``additions``.
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
