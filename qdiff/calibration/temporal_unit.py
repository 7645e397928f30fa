"""What a network computes from the timestep alone, as one unit of reconstruction that is fitted before all others.

Source: Huang et al. 2024, "TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models" (CVPR).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.interface import State, Step, SteppedNetwork, TemporalParts, temporal_parts_of
from qdiff.quant_model import QuantModel

NAME = "temporal"  # of the unit, and of its outputs in the state


def calibration_steps(qnn: QuantModel, inputs: tuple[Tensor, ...], temporal_unit: bool) -> SteppedNetwork:
    """Return a network as the steps that a method walks over.

    Args:
        inputs: some inputs of the network, batch first.
        temporal_unit: make what depends on t alone the first unit.

    Raises:
        UserError: it is not known what in this network depends on t alone.
    """
    if not temporal_unit:
        return qnn.as_steps(inputs)
    return TemporalNetwork(qnn.as_steps(inputs), known_temporal_parts(qnn.model))


def known_temporal_parts(network: nn.Module) -> TemporalParts:
    """Return what a network computes from t alone.

    Raises:
        UserError: it is not known.
    """
    parts = temporal_parts_of(network)
    if parts is None:
        raise UserError(
            f"the temporal unit of {type(network).__name__} is not known; give --no-temporal_unit, or in Python "
            "settings with temporal_unit=False"
        )
    return parts


class TemporalUnit(nn.Module):
    """Computes all projections of the time embedding, [N, Σ C_i], from the sinusoidal embedding, [N, C].

    Args:
        network: the network, shared.
        parts: what in it depends on t alone.
    """

    def __init__(self, network: SteppedNetwork, parts: TemporalParts) -> None:
        super().__init__()
        self.parts, self._network = parts, [network]  # in a list: only the layers belong to this unit
        self._steps = [step for step in network.steps() if step.name in parts.steps]
        self.projections = [network.get_submodule(name) for name in parts.projections]

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True):
        """Yield the unit and its layers, these under the names that they have in the network."""
        yield prefix, self
        for name in (*self.parts.steps, *self.parts.projections):
            path = f"{prefix}.{name}" if prefix else name
            yield from self._network[0].get_submodule(name).named_modules(memo, path, remove_duplicate)

    def forward(self, embedding: Tensor) -> Tensor:
        state: State = {self.parts.key: embedding}
        for step in self._steps:
            step(state)
        activated = self.parts.activation(state[self.parts.key])
        return torch.cat([projection(activated) for projection in self.projections], dim=1)


class GivenProjections(nn.Module):
    """A block whose projections of the time embedding are inputs: ``block(*inputs, *projections)``.

    Args:
        module: the block, shared.
        projections: the layers in it whose outputs are given.
    """

    def __init__(self, module: nn.Module, projections: list[nn.Module]) -> None:
        super().__init__()
        self.module, self._projections = module, projections

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True):
        """Yield the block's own modules without these layers, which belong to the temporal unit."""
        left_out = {m for projection in self._projections for m in projection.modules()}
        for name, module in self.module.named_modules(memo, prefix, remove_duplicate):
            if module not in left_out:
                yield name, module

    def forward(self, *inputs: Tensor) -> Tensor:
        count = len(inputs) - len(self._projections)
        with contextlib.ExitStack() as stack:
            for layer, output in zip(self._projections, inputs[count:], strict=True):
                stack.enter_context(_giving(layer, output))
            for block in self.module.modules():
                if getattr(block, "use_checkpoint", False):  # it would run again where the outputs are not given
                    stack.enter_context(_without_checkpoint(block))
            return self.module(*inputs[:count])


@contextlib.contextmanager
def _giving(layer: nn.Module, output: Tensor) -> Iterator[None]:
    layer.forward = lambda *_: output
    try:
        yield
    finally:
        del layer.forward


@contextlib.contextmanager
def _without_checkpoint(block: nn.Module) -> Iterator[None]:
    block.use_checkpoint = False
    try:
        yield
    finally:
        block.use_checkpoint = True


class TemporalNetwork(SteppedNetwork):
    """A view of a network whose first step is its `TemporalUnit`; the other steps get that unit's outputs.

    Args:
        network: shared, not copied.
        parts: what in it depends on t alone.
    """

    def __init__(self, network: SteppedNetwork, parts: TemporalParts) -> None:
        super().__init__()
        self.network, self.parts = network, parts

    def start(self, *inputs: Tensor | None) -> State:
        return self.network.start(*inputs)

    def steps(self) -> Iterator[Step]:
        unit, key = TemporalUnit(self.network, self.parts), self.parts.key
        yield Step(NAME, unit, lambda state: (state[key],), lambda state, out: state.__setitem__(NAME, out))
        columns = self._columns()
        for step in self.network.steps():
            inside = {name: columns[name] for name in columns if name.startswith(f"{step.name}.")}
            if step.name in self.parts.steps:
                continue
            if not inside:
                yield step
                continue
            block = GivenProjections(step.module, [self.network.get_submodule(name) for name in inside])
            yield Step(step.name, block, partial(_inputs, step, inside), step.output, step.is_unit)

    def _columns(self) -> dict[str, slice]:
        """Return where each projection is in the outputs of the temporal unit."""
        found, start = {}, 0
        for name in self.parts.projections:
            width = len(self.network.get_submodule(name).weight)
            found[name] = slice(start, start + width)
            start += width
        return found


def _inputs(step: Step, columns: Mapping[str, slice], state: State) -> tuple[Tensor, ...]:
    return (*step.inputs(state), *(state[NAME][:, part] for part in columns.values()))
