"""The interface between float networks and the engine: what a network needs in order to be quantized.

A family (a folder such as ``ddim/``) builds its network from ``nn.Conv1d/2d``, ``nn.Linear`` and
:class:`AttentionCore`, provides its forward as a sequence of :class:`Step`, and registers itself with
:func:`register_family`. The engine knows nothing else about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Any]
"""The state of a forward between two steps: tensors (batch first) and lists of tensors, by name."""


class AttentionCore(nn.Module):
    """softmax(q·kᵀ/√d)·v without parameters: the leaf that quantization replaces.

    Args:
        prescale: multiply q and k by 1/√√d each BEFORE they are quantized (unconditional latent diffusion does),
            instead of scaling the logits afterwards.

    Attributes:
        causal: a query sees only keys that do not come after it.
        scale: of the logits; None is 1/√d.
    """

    causal = False
    scale: float | None = None

    def __init__(self, prescale: bool = False) -> None:
        super().__init__()
        self.prescale = prescale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [N, heads, L, d], k and v [N, heads, S, d] → [N, heads, L, d].

        Args:
            mask: boolean (True takes part) or added to the logits; broadcast to [N, heads, L, S].
        """
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, scale=self.scale)


def split_input(layer: nn.Module, at: int) -> nn.Module:
    """Mark a layer whose input is a concatenation: its first ``at`` channels and the rest have two distributions.

    With split quantization, each part gets its own quantizers (Q-Diffusion, section 4.2).
    """
    layer.split_at = at
    return layer


# Without eq, because torch.compile takes the hash of the object before its fields are set.
@dataclass(frozen=True, eq=False)
class Step:
    """One step of a network's forward, and in general a unit that reconstruction works on.

    Attributes:
        name: dotted path of ``module`` inside the network.
        module: a block, or a single layer that is not part of a block.
        inputs: reads the module's positional inputs from the state; must not change the state.
        output: stores the module's output in the state.
        is_unit: False for what is only run: a part of an earlier step's module that is called once more, or what the
            network computes after its last layer.
    """

    name: str
    module: nn.Module
    inputs: Callable[[State], tuple[Tensor, ...]]
    output: Callable[[State, Tensor], None]
    is_unit: bool = True

    def __call__(self, state: State) -> None:
        self.output(state, self.module(*self.inputs(state)))


@dataclass(frozen=True)
class TemporalParts:
    """The layers of a network that compute from the timestep alone: the time embedding, and its projections in blocks.

    Attributes:
        key: the state's entry that holds the sinusoidal embedding at first, and then what the steps make of it.
        steps: names of the steps that compute the embedding.
        projections: names of the layers that project it, [N, C] → [N, C_i], in execution order.
        activation: what the embedding goes through before each projection.
    """

    key: str
    steps: tuple[str, ...]
    projections: tuple[str, ...]
    activation: Callable[[Tensor], Tensor] = F.silu


class SteppedNetwork(nn.Module):
    """A network whose forward is a sequence of named steps over an explicit state.

    Calibration advances stored activations from step to step, so that a walk over the network costs one forward per
    block, and not a forward from the first layer on for every block.
    """

    def start(self, *inputs: Tensor | None) -> State:
        """Return the state before the first step for the network's inputs (batch first)."""
        raise NotImplementedError

    def steps(self) -> Iterator[Step]:
        """Yield the steps in execution order; modules are looked up at every call, to include replaced layers."""
        raise NotImplementedError

    def temporal_parts(self) -> TemporalParts | None:
        """Return what depends on the timestep alone; None if that is not known."""
        return None

    def forward(self, *inputs: Tensor | None) -> Tensor:
        state = self.start(*inputs)
        for step in self.steps():
            step(state)
        return state["h"]


def temporal_parts_of(network: nn.Module) -> TemporalParts | None:
    """Return what a network computes from the timestep alone; None if that is not known."""
    return network.temporal_parts() if isinstance(network, SteppedNetwork) else None


@dataclass(frozen=True)
class Family:
    """What the engine must know about a model family besides its steps.

    Attributes:
        network: the class of its denoising network.
        published_names: (pattern, replacement) pairs that turn the engine's names into those of published
            checkpoint files, tried in order with ``re.sub``; only attention quantizers differ.
        symmetric_softmax: pattern of the published names of softmax quantizers that have a symmetric range in published
            checkpoints with symmetric activations; None if there are none.
        ends: names of the layer that takes the network's input and of the layer that returns its output.
        middle: name of the module whose output is the input of the middle attention block.
        prefix: what the names of all layers begin with, and `QuantConfig.layer_bits` leaves out.
    """

    network: type[nn.Module]
    published_names: tuple[tuple[str, str], ...] = ()
    symmetric_softmax: str | None = None
    ends: tuple[str, str] | None = None
    middle: str | None = None
    prefix: str = ""

    def published_name(self, name: str) -> str:
        for pattern, replacement in self.published_names:
            name = re.sub(pattern, replacement, name)
        return name


_FAMILIES: list[Family] = []


def register_family(family: Family) -> None:
    """Make a family known to the engine (once, where its network class is defined)."""
    _FAMILIES.append(family)


def family_of(network: nn.Module) -> Family:
    """Return a network's family: its attribute of that name, else the registered one, else the defaults."""
    if isinstance(getattr(network, "family", None), Family):
        return network.family
    for family in _FAMILIES:
        if isinstance(network, family.network):
            return family
    return Family(network=type(network))
