"""Any network as a `SteppedNetwork`: its forward is replayed, with the outputs of finished units in their places."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from qdiff.errors import UserError
from qdiff.interface import State, Step, SteppedNetwork
from qdiff.tracing.attention_calls import skip_attention
from qdiff.tracing.rows import Count, Rows
from qdiff.tracing.trace import Call, call_directly, trace_units
from qdiff.tracing.watch import TracedUnit

_TOLERANCE = 1e-4  # relative L2 of a replayed output; the same operations give nearly the same values

OUTPUT = "output"  # name of the step that gives the network's output


class UnitCall(nn.Module):
    """A unit that takes and returns batch-first tensors only.

    What else it was called with (constants, flags, the nesting of arguments) is remembered from the last replay.
    Several outputs are joined into one tensor [N, values].
    """

    def __init__(self, traced: TracedUnit, module: nn.Module) -> None:
        super().__init__()
        self.traced, self.module = traced, module
        self._arguments: tuple[list[Any], TreeSpec] | None = None
        self._outputs: tuple[list[Any], TreeSpec] | None = None
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []  # of each output, for one sample

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True):
        """Yield the unit's own modules, under the names that they have inside it."""
        return self.module.named_modules(memo, prefix, remove_duplicate)

    def forward(self, *inputs: Tensor) -> Tensor:
        leaves, spec = self._arguments
        if self.traced.changes_inputs:  # they are stored, and needed again
            inputs = tuple(i.clone() for i in inputs)
        args, kwargs = tree_unflatten(_filled(leaves, self.traced.inputs, inputs), spec)
        found, spec = tree_flatten(self.module(*args, **kwargs))
        parts = _taken(found, self.traced.outputs)
        self._outputs = _without(found, self.traced.outputs), spec
        self._shapes = [(part.shape[1:], part.dtype) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)

    def take(self, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
        """Return the batch-first tensors of a call's arguments, and remember the rest."""
        leaves, spec = tree_flatten((args, kwargs))
        self._arguments = _without(leaves, self.traced.inputs), spec
        return tuple(_taken(leaves, self.traced.inputs))

    def give(self, output: Tensor | None, count: int, device: torch.device) -> Any:
        """Return the module's output from what `forward` returned; None gives NaN, for outputs that nothing uses.

        Args:
            count: number of samples.
            device: of the NaN.
        """
        if output is None:
            nan = partial(torch.full, (), torch.nan, device=device)
            parts = [nan(dtype=dtype).expand(count, *shape) for shape, dtype in self._shapes]
        elif len(self._shapes) == 1:
            parts = [output]
        else:
            flat = output.split([shape.numel() for shape, _ in self._shapes], dim=1)
            parts = [p.reshape(len(p), *s).to(dtype) for p, (s, dtype) in zip(flat, self._shapes, strict=True)]
        if self.traced.output_changed:
            parts = [part.clone() for part in parts]
        leaves, spec = self._outputs
        return tree_unflatten(_filled(leaves, self.traced.outputs, parts), spec)


def _taken(leaves: Sequence[Any], rows: Sequence[Rows | Count | None]) -> list[Tensor]:
    return [r.by_sample(leaf) for leaf, r in zip(leaves, rows, strict=True) if isinstance(r, Rows)]


def _without(leaves: Sequence[Any], rows: Sequence[Rows | Count | None]) -> list[Any]:
    return [None if isinstance(r, Rows) else leaf for leaf, r in zip(leaves, rows, strict=True)]


def _filled(leaves: Sequence[Any], rows: Sequence[Rows | Count | None], tensors: Sequence[Tensor]) -> list[Any]:
    """Return leaves with tensors [N, …] where samples go, and N where samples are counted."""
    count, given = len(tensors[0]), iter(tensors)
    filled = []
    for leaf, r in zip(leaves, rows, strict=True):
        if isinstance(r, Rows):
            filled.append(r.as_called(next(given)))
        else:
            filled.append(r.per_sample * count if isinstance(r, Count) else leaf)
    return filled


class _Reached(Exception):
    """Ends a forward at the unit whose inputs are wanted."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.inputs = inputs


class ReplayedNetwork(SteppedNetwork):
    """Steps over the units of any network.

    A step's inputs come from a forward of the network in which earlier units return their stored outputs instead of
    computing them, so only what is computed between units is repeated. An output is dropped after the last unit that
    uses it.

    Args:
        network: shared, not copied; in float mode while this is built.
        inputs: some inputs of the network, batch first, on its device; the first sample or two are traced.
        leaves: its layers with products.
        call: runs the network on its inputs.
        named: see `trace_units`.

    Raises:
        UserError: the network cannot be cut into units.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Sequence[Tensor],
        leaves: Collection[nn.Module],
        call: Call = call_directly,
        named: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.network, self._call = network, call
        self.units = trace_units(network, inputs, leaves, call, named)
        self._calls = [UnitCall(unit, network.get_submodule(unit.name)) for unit in self.units]
        self._check([[i[row : row + 1] for i in inputs] for row in range(min(2, len(inputs[0])))])

    @torch.no_grad()
    def _check(self, samples: Sequence[Sequence[Tensor]]) -> None:
        for _ in range(2):
            if self._equals_the_forward(samples):
                return
            for unit in self.units:  # something uses outputs in a way that autograd does not see: keep all of them
                unit.until = len(self.units)
        raise UserError(
            f"{type(self.network).__name__} cannot be cut into units: a replayed forward gives another output; make it "
            "a qdiff.interface.SteppedNetwork"
        )

    def _equals_the_forward(self, samples: Sequence[Sequence[Tensor]]) -> bool:
        """Advance all samples together, as a calibration does, so that what a unit keeps of one shows in another."""
        expected = [self._call(self.network, *(i.clone() for i in sample)) for sample in samples]
        states = [self.start(*sample) for sample in samples]
        for step in self.steps():
            inputs = [step.inputs(state) for state in states]
            for state, taken in zip(states, inputs, strict=True):
                step.output(state, step.module(*taken))
        if expected[0].is_meta:  # only shapes are known
            return all(state["h"].shape == wanted.shape for state, wanted in zip(states, expected, strict=True))
        pairs = [(state["h"] - wanted, wanted) for state, wanted in zip(states, expected, strict=True)]
        return all(difference.norm() <= _TOLERANCE * wanted.norm() for difference, wanted in pairs)

    def start(self, *inputs: Tensor) -> State:
        return {"x": inputs[0]} | {f"input {i}": tensor for i, tensor in enumerate(inputs[1:], 1)}

    def steps(self) -> Iterator[Step]:
        for index, call in enumerate(self._calls):
            inputs, output = partial(self._inputs, index), partial(self._output, index)
            yield Step(call.traced.name, call, inputs, output, is_unit=not call.traced.repeats)
        yield Step(OUTPUT, nn.Identity(), self._end, _keep, is_unit=False)

    def _inputs(self, index: int, state: State) -> tuple[Tensor, ...]:
        try:
            self._replay(index, state)
        except _Reached as reached:
            return reached.inputs
        raise RuntimeError(f"the forward no longer reaches {self.units[index].name}")

    def _output(self, index: int, state: State, output: Tensor) -> None:
        state[_key(index)] = output
        for number, unit in enumerate(self.units[: index + 1]):
            if unit.until <= index:
                state.pop(_key(number), None)

    def _end(self, state: State) -> tuple[Tensor]:
        """Return the network's output."""
        return (self._replay(len(self.units), state),)

    def _replay(self, until: int, state: State) -> Tensor:
        """Run the forward with stored outputs up to a unit, where it raises `_Reached`, or to its end."""
        x = state["x"]
        inputs = [x, *(state[f"input {i}"] for i in range(1, sum(k.startswith("input ") for k in state) + 1))]
        turns: dict[nn.Module, list[Callable[..., Any]]] = {}  # what each call of a module returns, in turn
        for number, call in enumerate(self._calls[: until + 1]):
            stored = partial(_give, call, state.get(_key(number)), len(x), x.device)
            turns.setdefault(call.module, []).append(partial(_reach, call) if number == until else stored)
        with contextlib.ExitStack() as stack:
            for module, functions in turns.items():
                stack.enter_context(_forward_is(module, functions))
            return self._call(self.network, *(i.clone() for i in inputs))


def _keep(state: State, output: Tensor) -> None:
    state["h"] = output


def _key(number: int) -> str:
    return f"unit {number}"


def _reach(call: UnitCall, *args: Any, **kwargs: Any) -> None:
    raise _Reached(call.take(args, kwargs))


def _give(call: UnitCall, output: Tensor | None, count: int, device: torch.device, *_: Any, **__: Any) -> Any:
    skip_attention(call.module)
    return call.give(output, count, device)


@contextlib.contextmanager
def _forward_is(module: nn.Module, functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Have the calls of a module call functions instead, in turn; further calls are its own."""
    before, turns = module.__dict__.get("forward"), iter(functions)
    own = module.forward
    module.forward = lambda *args, **kwargs: next(turns, own)(*args, **kwargs)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
