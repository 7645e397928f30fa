"""Walk over a network's steps with stored activations, and capture the inputs and outputs of modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.sample_timesteps import SampleTimesteps
from qdiff.calibration.storage import ActivationStorage
from qdiff.errors import UserError
from qdiff.interface import State, Step, SteppedNetwork
from qdiff.modes import LEAVES, leaf_modes


def rows_of(state: State, rows: slice) -> State:
    """Return the state for some of the samples (views, not copies)."""

    def cut(value):
        if isinstance(value, Tensor):
            return value[rows]
        if isinstance(value, list):
            return [cut(v) for v in value]
        return value

    return {key: cut(value) for key, value in state.items()}


@dataclass(frozen=True)
class Walker:
    """Runs modules over all stored samples, batch by batch.

    Attributes:
        storage: holds the results, on the device or in RAM.
        device: the device that modules run on.
        batch_size: samples per batch; it affects running averages over batches alone.
        timesteps: of the samples, for ranges per timestep; None without such ranges.
        pass_size: the most samples that go through at a time; it affects no values. A batch may take several passes.
    """

    storage: ActivationStorage
    device: torch.device
    batch_size: int = 64
    timesteps: SampleTimesteps | None = None
    pass_size: int = 64

    def slices(self, count: int) -> Iterator[slice]:
        """Yield the samples of each pass over ``count`` samples."""
        return (rows for rows, _ in self.passes(count))

    def passes(self, count: int) -> Iterator[tuple[slice, Fraction]]:
        """Yield the samples of each pass, and which share of their batch they are."""
        for start in range(0, count, self.batch_size):
            size = min(self.batch_size, count - start)
            for first in range(0, size, self.pass_size):
                last = min(first + self.pass_size, size)
                yield slice(start + first, start + last), Fraction(last - first, size)

    @torch.no_grad()
    def map(self, function: Callable[..., tuple[Tensor, ...]], count: int) -> tuple[Tensor, ...]:
        """Apply ``function(rows) → tensors [n, …]`` to all samples and store the results, each [count, …]."""
        stored: tuple[Tensor, ...] = ()
        for rows in self.slices(count):
            results = function(rows)
            if not stored:
                stored = tuple(self.storage.empty((count, *r.shape[1:]), r.dtype) for r in results)
            for place, result in zip(stored, results, strict=True):
                place[rows].copy_(result)
        return stored

    def run(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the module's output for all samples, [N, …]."""
        return self.map(lambda rows: (module(*self.load(inputs, rows)),), len(inputs[0]))[0]

    def load(self, inputs: tuple[Tensor, ...], rows: slice | Tensor) -> tuple[Tensor, ...]:
        """Return some samples on the device; until the next call, quantizers take the ranges of their timesteps."""
        if self.timesteps is not None and inputs:
            self.timesteps.select(rows, len(inputs[0]))
        return tuple(i[rows].to(self.device) for i in inputs)

    def step_inputs(self, step: Step, state: State) -> tuple[Tensor, ...]:
        """Return the inputs that a step passes to its module, for all samples."""
        count = len(state["x"])

        def on_device(rows: slice) -> tuple[Tensor, ...]:
            part = rows_of(state, rows)
            # Steps may compute (normalise, concatenate), so their tensors move to the device of their modules.
            return step.inputs({k: _moved(v, self.device) for k, v in part.items()})

        return self.map(on_device, count)


def _moved(value, device: torch.device):
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):  # only the last skip is read
        return [*value[:-1], *(v.to(device) for v in value[-1:])]
    return value


def walk(
    network: SteppedNetwork, inputs: tuple[Tensor, ...], walker: Walker, weights: bool, activations: bool
) -> Iterator[tuple[int, Step, Unit, State]]:
    """Yield every step's unit in execution order; when control returns, activations advance past it.

    A step that is no unit is advanced past without being yielded.

    Two states advance together, one through the float network and one through the network as quantized so far. Each
    unit is therefore fitted on the inputs it will get in use and against the float output, and the whole walk costs one
    float and one quantized forward pass.

    Args:
        weights, activations: what is quantized in the advancing quantized state; without either, it is the float one.

    Yields:
        index, step, unit, and the quantized state before the step. The unit is emptied when the walk continues.
    """
    inputs = tuple(i.to(walker.storage.device) for i in inputs)
    with torch.no_grad():
        float_state = network.start(*inputs)
        quant_state = network.start(*inputs)
    in_float = not (weights or activations)
    for index, step in enumerate(network.steps()):
        float_inputs = walker.step_inputs(step, float_state)
        with leaf_modes([step.module], weights=False, activations=False):
            target = walker.run(step.module, float_inputs)
        quant_inputs = float_inputs if in_float else walker.step_inputs(step, quant_state)
        unit = Unit(step.name, step.module, quant_inputs, target, float_inputs, timesteps=walker.timesteps)
        if step.is_unit:
            yield index, step, unit, quant_state
        with leaf_modes([step.module], weights=weights, activations=activations):
            output = target if in_float else walker.run(step.module, quant_inputs)
        if unit.on_advance is not None:
            unit.on_advance(output)
        step.output(float_state, target)
        step.output(quant_state, output)
        # The caller may still hold the unit, so drop its activations here to free their memory.
        unit.inputs = unit.float_inputs = ()
        unit.target, unit.weights = torch.empty(0), None
        del float_inputs, quant_inputs, target, output


def leaves_in_execution_order(
    module: nn.Module, inputs: tuple[Tensor, ...], walker: Walker
) -> list[tuple[str, nn.Module]]:
    """Return the quantized leaves of a module in the order in which a forward pass reaches them."""
    order: list[tuple[str, nn.Module]] = []
    names = {m: n for n, m in module.named_modules() if isinstance(m, LEAVES)}
    with contextlib.ExitStack() as stack:
        for leaf, name in names.items():
            handle = leaf.register_forward_pre_hook(lambda m, _, name=name: order.append((name, m)))
            stack.callback(handle.remove)
        with torch.no_grad():
            module(*walker.load(inputs, slice(0, 1)))
    return list(dict.fromkeys(order))


def leaf_inputs_and_output(
    module: nn.Module, leaf: nn.Module, inputs: tuple[Tensor, ...], walker: Walker
) -> tuple[Tensor, ...]:
    """Run a module over all samples and return one leaf's inputs and output: (*inputs, output), each [rows, …].

    There are N rows, or k·N for a leaf that is called several times or with several rows per sample (tokens of several
    images, say). A module that runs its leaves several times on purpose says so by its ``runs``
    (`qdiff.calibration.pairs.PairedCall`); then each is [rows, runs, …].

    Raises:
        UserError: the leaf's calls have different shapes, or rows that belong to no sample.
    """
    seen: list[tuple[Tensor, ...]] = []
    runs = getattr(module, "runs", 1)
    # Cloned, because what follows a leaf may change its output in place, e.g. ``nn.ReLU(inplace=True)``.
    handle = leaf.register_forward_hook(lambda _, args, out: seen.append(tuple(t.clone() for t in (*args, out))))
    try:

        def captured(rows: slice) -> tuple[Tensor, ...]:
            module(*walker.load(inputs, rows))
            calls = [seen.pop(0) for _ in range(len(seen))]
            return tuple(_by_sample(values, rows.stop - rows.start, runs) for values in zip(*calls, strict=True))

        return tuple(t.flatten(0, 1) for t in walker.map(captured, len(inputs[0])))
    finally:
        handle.remove()


def _by_sample(calls: tuple[Tensor, ...], count: int, runs: int) -> Tensor:
    """Return what a leaf took or gave in its calls as [samples, rows per sample, …], or [samples, rows, runs, …]."""
    first = calls[0]
    if any(c.shape != first.shape for c in calls) or len(first) % count or len(calls) % runs:
        raise UserError(
            "a layer is called with several shapes, or with rows that belong to no sample, and cannot be fitted by "
            "itself; fit whole blocks (--recon_unit block)"
        )
    by_sample = torch.stack([c.unflatten(0, (count, -1)) for c in calls]).unflatten(0, (runs, -1))
    by_sample = by_sample.permute(2, 1, 3, 0, *range(4, by_sample.dim())).flatten(1, 2)
    return by_sample.squeeze(2) if runs == 1 else by_sample
