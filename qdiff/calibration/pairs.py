"""Pairs of consecutive sampling steps, on which the ranges of activation changes (MoDiff) are calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from qdiff.calibration.objectives import Objective
from qdiff.interface import State, Step, SteppedNetwork
from qdiff.modulation import memories
from qdiff.quant_layer import QuantModule

BEFORE, NOW = 0, 1


class PairedCall(nn.Module):
    """Runs a module on the previous step and then on the step itself, as the first two steps of a trajectory.

    ``paired(*inputs)``: each [N, 2, …] → [N, 2, …]. Gradients flow through the second step only.
    """

    runs = 2  # of the module in one call

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        layers = {name: m for name, m in self.module.named_modules() if isinstance(m, QuantModule)}
        with memories(layers):
            with torch.no_grad():
                before = self.module(*(i[:, BEFORE] for i in inputs))
            return torch.stack([before, self.module(*(i[:, NOW] for i in inputs))], dim=1)


class PairedNetwork(SteppedNetwork):
    """A network whose samples are pairs: inputs, activations and outputs are [N, 2, …], modules are `PairedCall`.

    Args:
        network: runs on both steps of a pair; shared, not copied.
    """

    def __init__(self, network: SteppedNetwork) -> None:
        super().__init__()
        self.network = network

    def start(self, *inputs: Tensor) -> State:
        return _each(self.network.start(*(i.flatten(0, 1) for i in inputs)), _paired)

    def steps(self) -> Iterator[Step]:
        for step in self.network.steps():
            inputs, output = partial(_inputs, step), partial(_output, step)
            yield Step(step.name, PairedCall(step.module), inputs, output, step.is_unit)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _paired(x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, 2))


def _each(state: State, change: Callable[[Tensor], Tensor]) -> State:
    """Return the state with ``change`` applied to all its tensors."""

    def changed(value):
        if isinstance(value, Tensor):
            return change(value)
        return [changed(v) for v in value] if isinstance(value, list) else value

    return {key: changed(value) for key, value in state.items()}


def _inputs(step: Step, state: State) -> tuple[Tensor, ...]:
    return tuple(_paired(i) for i in step.inputs(_each(state, _flat)))


def _output(step: Step, state: State, output: Tensor) -> None:
    flat = _each(state, _flat)
    step.output(flat, _flat(output))
    state.clear()
    state.update(_each(flat, _paired))


def of_second(objective: Objective) -> Objective:
    """Return an objective of paired outputs [n, 2, …] that uses only the second step of each pair."""
    return lambda output, target, weight: objective(output[:, NOW], target[:, NOW], weight)
