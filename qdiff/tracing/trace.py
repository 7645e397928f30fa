"""What a forward of any network calls, and its units in execution order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.tracing.attention_calls import CallCounter
from qdiff.tracing.units import PRODUCTS, choose_units
from qdiff.tracing.watch import TracedUnit, Watch

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
        shapes: of the first argument at all calls of a module, by its name.
    """

    modules: dict[str, int]
    attention: dict[str, int]
    products: tuple[str, ...]
    shapes: dict[str, set[torch.Size]]

    def repeated(self, network: nn.Module) -> list[str]:
        """Return the names of layers with products that a forward calls several times."""
        return [n for n, m in network.named_modules() if isinstance(m, PRODUCTS) and self.modules.get(n, 0) > 1]

    def never_called(self, network: nn.Module) -> list[str]:
        """Return the names of layers with products that the forward does not use; a shared layer has several."""
        called = {m for n, m in network.named_modules() if n in self.modules}
        everywhere = network.named_modules(remove_duplicate=False)
        return [n for n, m in everywhere if isinstance(m, PRODUCTS) and m not in called]


@torch.no_grad()
def count_calls(network: nn.Module, inputs: Sequence[Tensor], call: Call = call_directly) -> CallCounts:
    """Run the network once on the first sample and count what it calls.

    Args:
        inputs: the network's inputs, batch first.
    """
    names = {m: n for n, m in network.named_modules()}
    counts: Counter[str] = Counter()
    shapes: dict[str, set[torch.Size]] = defaultdict(set)

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        counts.update([names[module]])
        shapes[names[module]] |= {a.shape for a in args[:1] if isinstance(a, Tensor)}

    handles = [m.register_forward_pre_hook(count) for m in names]
    try:
        with CallCounter(network).counting() as counter:
            call(network, *(i[:1].clone() for i in inputs))  # a network may change its inputs in place
    finally:
        for handle in handles:
            handle.remove()
    return CallCounts(dict(counts), counter.attention, tuple(sorted(counter.products)), dict(shapes))


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
        UserError: a named unit is wrong, a layer is used by two units, or the samples of a batch cannot be told apart
            in a unit's tensors or in the output.
    """
    one = [i[:1] for i in inputs]
    two = [i[:2] if len(i) > 1 else torch.cat([i, i]) for i in inputs]
    calls = count_calls(network, one, call).modules
    reached = {m for n, m in network.named_modules() if n in calls}
    chosen = choose_units(network, {leaf for leaf in leaves if leaf in reached}, calls, named)
    watch = Watch(network, chosen, leaves)
    for batch in (one, two):
        with watch.watching():
            output = call(network, *(i.clone() for i in batch))
            watch.end(output)
    return watch.units()
