"""The memory that calibration needs per sample, counted in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from qdiff.interface import AttentionCore, State, SteppedNetwork
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QuantModule

FLOAT = 4  # bytes
# Memory held by a forward and backward pass of a quantized unit, in multiples of its leaves' inputs and outputs:
# autograd keeps 0.1 to 2.1 times those (counted by its saved-tensor hooks on the bundled class-conditional model);
# gradients come on top.
GRADIENT_COPIES = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes that calibration holds per sample.

    Attributes:
        stored: the most activations that a walk keeps at a time (two states, inputs, outputs).
        inside: per step, the inputs and outputs of its leaves during one forward pass.
        layer_inputs: the inputs of the layers of one step, of the step that has the most.
    """

    stored: int
    inside: dict[str, int] = field(default_factory=dict)
    layer_inputs: int = 0

    @property
    def with_layer_inputs(self) -> Footprint:
        """The footprint of a walk that also stores the inputs of a unit's layers (`UnitInputs`)."""
        # Those of one layer are held in the quantized network as well, so twice is an upper bound.
        return replace(self, stored=self.stored + 2 * self.layer_inputs)

    def forward_batch(self, pass_bytes: int, limit: int) -> int:
        """Return how many samples fit in a forward pass of any step."""
        return max(1, min(limit, pass_bytes // max(1, *self.inside.values(), 1)))

    def training_batch(self, step: str, pass_bytes: int, limit: int) -> int:
        """Return how many samples fit in a forward and backward pass of one step."""
        return max(1, min(limit, pass_bytes // max(1, self.inside.get(step, 1) * GRADIENT_COPIES)))


def _bytes(tensors: object) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, list | tuple):
        return sum(_bytes(t) for t in tensors)
    return 0


def _state_bytes(state: State, given: set[int]) -> int:
    """Return the bytes of a state's tensors, each counted once, without the network's own inputs."""
    flat = [t for v in state.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
    return sum(_bytes(t) for t in {id(t): t for t in flat if id(t) not in given}.values())


@torch.no_grad()
def measure_footprint(network: SteppedNetwork, sample: tuple[Tensor, ...]) -> Footprint:
    """Run one sample through a network step by step and count the bytes that a calibration walk would hold for it.

    Args:
        sample: the network's inputs with a batch of 1, on its device.
    """
    state = network.start(*sample)
    given = {id(t) for t in sample}
    stored, inside, layer_inputs = 0, {}, 0
    for step in network.steps():
        inputs = step.inputs(state)
        with _counted(step.module) as count:
            output = step.module(*inputs)
        inside[step.name] = count.inside
        layer_inputs = max(layer_inputs, count.layer_inputs)
        # `walk` holds a float and a quantized state, the unit's inputs in both, its target and its output.
        stored = max(stored, 2 * (_state_bytes(state, given) + _bytes(inputs) + _bytes(output)))
        step.output(state, output)
    return Footprint(stored + _bytes(sample), inside, layer_inputs)


@dataclass
class _Count:
    """Bytes counted in one forward pass of a step; see `Footprint`."""

    inside: int = 0
    layer_inputs: int = 0


@contextlib.contextmanager
def _counted(module: nn.Module) -> Iterator[_Count]:
    count = _Count()

    def add(leaf: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        count.inside += _bytes(inputs) + _bytes(output)
        if isinstance(leaf, QuantModule):
            count.layer_inputs += _bytes(inputs)
        if isinstance(leaf, AttentionCore | QuantAttention):
            # Quantized attention holds the logits, the softmax output and its quantized form.
            q, k, *_ = inputs
            count.inside += 3 * FLOAT * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]

    leaves = [m for m in module.modules() if not list(m.children()) or isinstance(m, QuantModule | QuantAttention)]
    handles = [leaf.register_forward_hook(add) for leaf in leaves]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
