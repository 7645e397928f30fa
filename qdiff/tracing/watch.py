"""Two traced forwards of a network, of one sample and of two, from which its units' tensors are known."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from qdiff.errors import UserError
from qdiff.tracing.rows import Count, Rows, constant_or_count, rows_of_pair


@dataclass
class TracedUnit:
    """A unit in execution order.

    Attributes:
        name: the module's path in the network.
        inputs: how each leaf of (args, kwargs) holds the samples, or counts them; None for constants.
        outputs: likewise for the leaves of the output.
        until: index of the last unit whose inputs are computed from this unit's output; the number of units if the
            network's output is.
        repeats: it is a part of an earlier unit, called once more by the network itself.
        output_changed: whether its output is changed in place by what comes after it.
        changes_inputs: whether it changes its inputs in place.
    """

    name: str
    inputs: list[Rows | Count | None] = field(default_factory=list)
    outputs: list[Rows | Count | None] = field(default_factory=list)
    until: int = 0
    repeats: bool = False
    output_changed: bool = False
    changes_inputs: bool = False


@dataclass
class _Seen:
    """One unit in one forward: the leaves of its inputs and outputs, and the units that its inputs come from."""

    name: str
    inputs: list[Any]
    sources: set[int]
    versions: list[int]
    outputs: list[Any] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)
    repeats: bool = False
    changes_inputs: bool = False


@dataclass
class _Run:
    """One forward: its units in execution order, the leaves of its output, and the units that it comes from."""

    units: list[_Seen] = field(default_factory=list)
    output: list[Any] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)


class Watch:
    """Hooks on units that record their tensors, and find by autograd which unit's output each input comes from.

    A unit's outputs are replaced by tensors that require a gradient, so the graph of what is computed between units
    leads back to them. Units themselves run without gradients.

    A part of a unit that the network itself calls once more is recorded as a unit that repeats.

    Args:
        names: the units.
        leaves: the layers with products.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], leaves: Collection[nn.Module]) -> None:
        self.names = set(names)
        self.holders: dict[str, nn.Module] = {}  # units, and what holds layers inside them
        self.unit_of: dict[str, str] = {}
        for unit in names:
            for name, module in network.get_submodule(unit).named_modules(prefix=unit):
                if any(m in leaves for m in module.modules()):
                    self.holders[name], self.unit_of[name] = module, unit
        self.runs: list[_Run] = []
        self._running: list[str] = []
        self._sources: dict[int, int] = {}  # identity of a replaced output → index of its unit
        self._kept: list[Tensor] = []  # so that identities stay unique

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the forward that runs inside the block."""
        self.runs.append(_Run())
        self._running, self._sources, self._kept = [], {}, []
        handles = []
        for name, module in self.holders.items():
            enter = lambda _, args, kwargs, name=name: self._enter(name, args, kwargs)  # noqa: E731
            leave = lambda _, __, output, name=name: self._leave(name, output)  # noqa: E731
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def end(self, output: Any) -> None:
        """Record the output of the forward that was watched."""
        leaves, _ = tree_flatten(output)
        self.runs[-1].output = [_plain(leaf) for leaf in leaves]
        self.runs[-1].ends = self._reach(leaves)

    def _enter(self, name: str, args: tuple, kwargs: dict) -> None:
        if self._running:
            if self.unit_of[name] != self.unit_of[self._running[0]]:
                raise UserError(
                    f"{name} of the unit {self.unit_of[name]} is called inside the unit {self._running[0]}; name a "
                    "module around both as a unit"
                )
            return
        repeats = name not in self.names
        if repeats and self.unit_of[name] not in [seen.name for seen in self.runs[-1].units]:
            raise UserError(
                f"{name} of the unit {self.unit_of[name]} is called before this unit; name a module around both calls "
                "as a unit"
            )
        self._running.append(name)
        found, _ = tree_flatten((args, kwargs))
        versions = [leaf._version for leaf in found if isinstance(leaf, Tensor)]
        plain = [_plain(leaf) for leaf in found]
        self.runs[-1].units.append(_Seen(name, plain, self._reach(found), versions, repeats=repeats))
        torch.set_grad_enabled(False)

    def _leave(self, name: str, output: Any) -> Any:
        if self._running != [name]:
            return output
        torch.set_grad_enabled(True)
        self._running.pop()
        seen, index = self.runs[-1].units[-1], len(self.runs[-1].units) - 1
        seen.changes_inputs = seen.versions != [leaf._version for leaf in seen.inputs if isinstance(leaf, Tensor)]
        leaves, spec = tree_flatten(output)
        seen.outputs = [_plain(leaf) for leaf in leaves]
        given = [self._marked(leaf, index) for leaf in leaves]
        seen.given = [leaf for leaf in given if isinstance(leaf, Tensor)]
        return tree_unflatten(given, spec)

    def _marked(self, leaf: Any, index: int) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        mark = leaf.detach().requires_grad_()
        self._sources[id(mark)] = index
        self._kept.append(mark)
        return mark.clone()  # not the mark itself, which could not be changed in place

    def _reach(self, tensors: Sequence[Any]) -> set[int]:
        """Return the indices of the units whose outputs the tensors were computed from, with no unit between."""
        pending = [t.grad_fn for t in tensors if isinstance(t, Tensor) and t.grad_fn is not None]
        found, visited = set(), set()
        while pending:
            node = pending.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            source = self._sources.get(id(getattr(node, "variable", None)))
            if source is not None:
                found.add(source)
            pending += [following for following, _ in node.next_functions]
        return found

    def units(self) -> list[TracedUnit]:
        """Return the units in execution order, from the forwards of one sample and of two.

        Raises:
            UserError: the forwards differ by more than the number of samples.
        """
        one, two = self.runs
        if [seen.name for seen in one.units] != [seen.name for seen in two.units]:
            raise UserError("the network calls other modules for two samples than for one; it cannot be cut into units")
        units = [self._unit(index, *pair) for index, pair in enumerate(zip(one.units, two.units, strict=True))]
        _rows("the network", "output", one.output, two.output)
        return units

    def _unit(self, index: int, one: _Seen, two: _Seen) -> TracedUnit:
        run = self.runs[0]
        users = [i for i, seen in enumerate(run.units) if index in seen.sources]
        # Integers carry no gradient, so who uses them is not known.
        traceable = all(leaf.is_floating_point() for leaf in one.outputs if isinstance(leaf, Tensor))
        until = len(run.units) if index in run.ends or not traceable else max(users, default=index)
        return TracedUnit(
            one.name,
            _rows(one.name, "input", one.inputs, two.inputs),
            _rows(one.name, "output", one.outputs, two.outputs),
            until,
            one.repeats,
            output_changed=any(given._version > 0 for given in one.given),
            changes_inputs=one.changes_inputs,
        )


def _plain(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _rows(name: str, what: str, one: list[Any], two: list[Any]) -> list[Rows | Count | None]:
    """Return how the samples lie in each leaf of a unit's inputs or outputs.

    Args:
        what: "input" or "output", for the error.
    """
    found: list[Rows | Count | None] = []
    try:
        if len(one) != len(two):
            raise ValueError("has another structure for two samples than for one")
        for a, b in zip(one, two, strict=True):
            found.append(rows_of_pair(a, b) if isinstance(a, Tensor) else constant_or_count(a, b))
        if not any(isinstance(rows, Rows) for rows in found):
            raise ValueError("depends on nothing but constants")
    except ValueError as error:
        raise UserError(
            f"the {what} of {name} {error}; the units of this network cannot be found, make it a "
            "qdiff.interface.SteppedNetwork or name other units"
        ) from None
    return found
