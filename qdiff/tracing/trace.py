"""What a forward of any network does, from traced forwards: the units' order, their tensors, and who uses them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from qdiff.errors import UserError
from qdiff.tracing.attention_calls import CallCounter
from qdiff.tracing.rows import Rows, rows_of_pair
from qdiff.tracing.units import PRODUCTS, choose_units

Call = Callable[..., Tensor]
"""``call(network, *inputs)`` runs a network on batch-first tensors and returns its output, [N, …]."""


def call_directly(network: nn.Module, *inputs: Tensor) -> Tensor:
    return network(*inputs)


@dataclass(frozen=True)
class CallCounts:
    """What one forward of a network calls.

    Attributes:
        modules: calls per module name; modules that are never called are missing.
        attention: calls of ``F.scaled_dot_product_attention`` that a module's own forward makes, by module name.
        products: names of modules that multiply two computed tensors by other means; these products stay in float.
    """

    modules: dict[str, int]
    attention: dict[str, int]
    products: tuple[str, ...]

    def never_called(self, network: nn.Module) -> list[str]:
        """Return the names of layers with products that the forward does not use."""
        called = {m for n, m in network.named_modules() if n in self.modules}
        return [n for n, m in network.named_modules() if isinstance(m, PRODUCTS) and m not in called]


@torch.no_grad()
def count_calls(network: nn.Module, inputs: Sequence[Tensor], call: Call = call_directly) -> CallCounts:
    """Run the network once on the first sample and count what it calls.

    Args:
        inputs: the network's inputs, batch first.
    """
    names = {m: n for n, m in network.named_modules()}
    counts: Counter[str] = Counter()
    handles = [m.register_forward_pre_hook(lambda m, _: counts.update([names[m]])) for m in names]
    try:
        with CallCounter(network).counting() as counter:
            call(network, *(i[:1] for i in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return CallCounts(dict(counts), counter.attention, tuple(sorted(counter.products)))


@dataclass
class TracedUnit:
    """A unit in execution order.

    Attributes:
        name: the module's path in the network.
        inputs: how each leaf of (args, kwargs) holds the samples; None for constants and what is no tensor.
        outputs: likewise for the leaves of the output.
        until: index of the last unit whose inputs are computed from this unit's output; the number of units if the
            network's output is.
        changed: whether its output is changed in place by what comes after it.
    """

    name: str
    inputs: list[Rows | None] = field(default_factory=list)
    outputs: list[Rows | None] = field(default_factory=list)
    until: int = 0
    changed: bool = False


def trace_units(
    network: nn.Module,
    inputs: Sequence[Tensor],
    leaves: Collection[nn.Module],
    call: Call = call_directly,
    named: Sequence[str] | None = None,
) -> list[TracedUnit]:
    """Find a network's units in the order in which a forward reaches them.

    Args:
        inputs: the network's inputs, batch first, on its device.
        leaves: its layers with products.
        named: names of modules that the user wants as units; the rest is cut automatically.

    Raises:
        UserError: a named unit is wrong, or the samples of a batch cannot be told apart in a unit's tensors.
    """
    one = [i[:1] for i in inputs]
    two = [i[:2] if len(i) > 1 else torch.cat([i, i]) for i in inputs]
    calls = count_calls(network, one, call).modules
    reached = {m for n, m in network.named_modules() if n in calls}
    chosen = choose_units(network, {leaf for leaf in leaves if leaf in reached}, calls, named)
    watch = _Watch(network, chosen)
    for batch in (one, two):
        with watch.watching():
            output = call(network, *batch)
            watch.end(output)
    return watch.units()


@dataclass
class _Seen:
    """One unit in one traced forward: the leaves of its inputs and outputs, and the units its inputs come from."""

    name: str
    inputs: list[Any]
    sources: set[int]
    outputs: list[Any] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)


class _Watch:
    """Hooks on units that record their tensors, and find by autograd which unit's output each input comes from.

    A unit's outputs are replaced by tensors that require a gradient, so the graph of what is computed between units
    leads back to them. Units themselves run without gradients.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.modules = {name: network.get_submodule(name) for name in names}
        self.runs: list[list[_Seen]] = []
        self._sources: dict[int, int] = {}  # identity of a replaced output → index of its unit
        self._kept: list[Tensor] = []  # so that identities stay unique
        self._ends: set[int] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.runs.append([])
        self._sources, self._kept = {}, []
        handles = []
        for name, module in self.modules.items():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: self._enter(name, args, kwargs), with_kwargs=True
                )
            )
            handles.append(module.register_forward_hook(lambda _, __, output: self._leave(output)))
        try:
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, args: tuple, kwargs: dict) -> None:
        found, _ = tree_flatten((args, kwargs))
        self.runs[-1].append(_Seen(name, [_plain(leaf) for leaf in found], self._reach(found)))
        torch.set_grad_enabled(False)

    def _leave(self, output: Any) -> Any:
        torch.set_grad_enabled(True)
        seen, index = self.runs[-1][-1], len(self.runs[-1]) - 1
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

    def end(self, output: Tensor) -> None:
        self._ends = self._reach([output])

    def units(self) -> list[TracedUnit]:
        one, two = self.runs
        names = [seen.name for seen in one]
        if names != [seen.name for seen in two]:
            raise UserError("the network calls other modules for two samples than for one; it cannot be cut into units")
        count, units = len(one), []
        for index, (first, second) in enumerate(zip(one, two, strict=True)):
            users = [i for i, seen in enumerate(one) if index in seen.sources]
            # Integers carry no gradient, so who uses them is not known.
            traceable = all(leaf.is_floating_point() for leaf in first.outputs if isinstance(leaf, Tensor))
            inputs = _rows(first.name, "an input", first.inputs, second.inputs)
            if not any(inputs):
                raise UserError(
                    f"{first.name} takes nothing that depends on the samples, so it cannot be calibrated; name a unit "
                    "around it"
                )
            until = count if index in self._ends or not traceable else max(users, default=index)
            units.append(
                TracedUnit(
                    first.name,
                    inputs,
                    _rows(first.name, "an output", first.outputs, second.outputs),
                    until,
                    any(given._version > 0 for given in first.given),
                )
            )
        return units


def _plain(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _rows(name: str, what: str, one: list[Any], two: list[Any]) -> list[Rows | None]:
    found: list[Rows | None] = []
    for a, b in zip(one, two, strict=True):
        try:
            found.append(rows_of_pair(a, b) if isinstance(a, Tensor) else None)
        except ValueError as error:
            raise UserError(
                f"{what} of {name} {error}; the units of this network cannot be found, make it a "
                "qdiff.interface.SteppedNetwork or name other units"
            ) from None
    return found
