"""Cut a network into units of reconstruction: residual blocks, transformer blocks, and single layers between them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from qdiff.errors import UserError
from qdiff.interface import AttentionCore

PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Linear, AttentionCore)
_LISTS = (nn.ModuleList, nn.ModuleDict)  # never called themselves


def _weighs(module: nn.Module, leaves: Collection[nn.Module]) -> int:
    """Return how many layers with products are inside a module."""
    return sum(m in leaves for m in module.modules())


def _holds_blocks(module: nn.Module, leaves: Collection[nn.Module]) -> bool:
    """Whether a module has a list of blocks inside; a block has at least two layers with products."""
    return any(
        isinstance(part, (*_LISTS, nn.Sequential)) and any(_weighs(child, leaves) > 1 for child in part.children())
        for part in module.modules()
    )


def candidates(network: nn.Module, leaves: Collection[nn.Module]) -> Iterator[str]:
    """Yield the names of the largest modules that are single blocks, in registration order.

    A module that holds a list of blocks is not a block itself; its children are looked at instead. The network is never
    a unit, unless it is a single layer.

    Args:
        leaves: the layers with products.
    """

    def descend(module: nn.Module, name: str, is_root: bool) -> Iterator[str]:
        if _weighs(module, leaves) == 0:
            return
        if module in leaves or not (is_root or isinstance(module, _LISTS) or _holds_blocks(module, leaves)):
            yield name
            return
        for child_name, child in module.named_children():
            yield from descend(child, f"{name}.{child_name}" if name else child_name, False)

    yield from dict.fromkeys(descend(network, "", True))


def children_with_products(network: nn.Module, name: str, leaves: Collection[nn.Module]) -> list[str]:
    """Return the names of a module's children that hold layers with products."""
    module = network.get_submodule(name)
    return [f"{name}.{n}" if name else n for n, child in module.named_children() if _weighs(child, leaves)]


def choose_units(
    network: nn.Module,
    leaves: Collection[nn.Module],
    calls: Mapping[str, int],
    named: Sequence[str] | None = None,
) -> list[str]:
    """Return the names of modules that together hold all layers that are called, each called once per forward.

    A candidate that is never called as a whole (its children are called by others) is replaced by its children; one
    that is called several times by the module around it.

    Args:
        leaves: the layers with products that are called.
        calls: calls per forward, by module name.
        named: units that the user wants; the rest is cut automatically.

    Raises:
        UserError: a named unit does not exist, holds no layers, or is not called exactly once per forward.
    """
    chosen = list(named or ())
    for name in chosen:
        _check_named(network, name, leaves, calls)
    pending = [n for n in candidates(network, leaves) if not any(_inside(n, unit) for unit in chosen)]
    while pending:
        name = pending.pop(0)
        if any(_inside(name, unit) for unit in chosen):
            continue
        if any(_inside(unit, name) for unit in named or ()):  # the user cuts it finer
            pending = [n for n in children_with_products(network, name, leaves)] + pending
            continue
        count = calls.get(name, 0)
        if count == 1 or name == "":
            chosen = [unit for unit in chosen if not _inside(unit, name)]
            chosen.append(name)
        elif count == 0:
            pending = children_with_products(network, name, leaves) + pending
        else:
            pending = [_around(network, name, calls), *pending]
    return chosen


def _inside(name: str, unit: str) -> bool:
    return unit == "" or name == unit or name.startswith(f"{unit}.")


def _around(network: nn.Module, name: str, calls: Mapping[str, int]) -> str:
    """Return the nearest module around a name that is called and has that name inside; the network at the end."""
    while name:
        name = name.rpartition(".")[0]
        if calls.get(name, 0) == 1:
            return name
    return ""


def _check_named(network: nn.Module, name: str, leaves: Collection[nn.Module], calls: Mapping[str, int]) -> None:
    try:
        module = network.get_submodule(name)
    except AttributeError:
        raise UserError(f"{type(network).__name__} has no module {name}; give names of its modules as units") from None
    if _weighs(module, leaves) == 0:
        raise UserError(f"the unit {name} holds no layer to quantize; name a module that holds one")
    if calls.get(name, 0) != 1:
        raise UserError(
            f"the unit {name} is called {calls.get(name, 0)} times per forward; name a module that is called once"
        )
