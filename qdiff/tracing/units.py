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
            yield from descend(child, _join(name, child_name), False)

    yield from dict.fromkeys(descend(network, "", True))


def choose_units(
    network: nn.Module,
    leaves: Collection[nn.Module],
    calls: Mapping[str, int],
    named: Sequence[str] | None = None,
) -> list[str]:
    """Return the names of modules that together hold all layers that are called, each called once per forward.

    A candidate that is never called as a whole (its children are called by others) is replaced by its children; one
    that is called several times, or shares a layer with another, by the module around it.

    Args:
        leaves: the layers with products that are called.
        calls: calls per forward, by module name.
        named: units that the user wants; the rest is cut automatically.

    Raises:
        UserError: a named unit does not exist, holds no layers, is not called exactly once per forward, or is inside
            another unit.
    """
    named = list(named or ())
    for name in named:
        _check_named(network, name, leaves, calls, named)
    repeated = _repeated(network, leaves, calls)
    chosen, pending = list(named), list(candidates(network, leaves))
    while pending:
        name = pending.pop(0)
        if any(_inside(name, unit) for unit in chosen):
            continue
        is_whole = name == "" or calls.get(name, 0) > 0
        if not is_whole or any(_inside(unit, name) for unit in named):  # the user cuts it finer
            pending = _children_with_products(network, name, leaves) + pending
            continue
        around = _around(network, name, calls, repeated)
        if around == name:
            chosen = [unit for unit in chosen if not _inside(unit, name)]
            chosen.append(name)
            continue
        for unit in named:
            if _inside(unit, around):
                raise UserError(
                    f"{name} is used several times per forward, so that {around or 'the network'} must be one unit, "
                    f"and {unit} is inside it; leave {unit} out of the units"
                )
        pending = [around, *pending]
    return chosen


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _inside(name: str, unit: str) -> bool:
    return unit == "" or name == unit or name.startswith(f"{unit}.")


def _children_with_products(network: nn.Module, name: str, leaves: Collection[nn.Module]) -> list[str]:
    module = network.get_submodule(name)
    return [_join(name, n) for n, child in module.named_children() if _weighs(child, leaves)]


def _repeated(
    network: nn.Module, leaves: Collection[nn.Module], calls: Mapping[str, int]
) -> dict[nn.Module, list[str]]:
    """Return all names of each layer that is called several times; a shared layer has several."""
    found = {m: [n] for n, m in network.named_modules() if m in leaves and calls.get(n, 0) > 1}
    for name, module in network.named_modules(remove_duplicate=False):
        if module in found and name not in found[module]:
            found[module].append(name)
    return found


def _around(
    network: nn.Module, name: str, calls: Mapping[str, int], repeated: Mapping[nn.Module, Sequence[str]]
) -> str:
    """Return the nearest module from a name upwards that is called once and has all calls of its layers inside.

    At the end that is the network.
    """
    while name:
        inside = set(network.get_submodule(name).modules())
        places = [place for layer, names in repeated.items() if layer in inside for place in names]
        if calls.get(name, 0) == 1 and all(_inside(place, name) for place in places):
            return name
        name = name.rpartition(".")[0]
    return ""


def find_unit(network: nn.Module, name: str) -> nn.Module:
    """Return a module that is to be a unit; a `UserError` if there is none of this name."""
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise UserError(f"{type(network).__name__} has no module {name}; give names of its modules as units") from None


def _check_named(
    network: nn.Module, name: str, leaves: Collection[nn.Module], calls: Mapping[str, int], named: Sequence[str]
) -> None:
    module = find_unit(network, name)
    if _weighs(module, leaves) == 0:
        raise UserError(f"the unit {name} holds no layer to quantize; name a module that holds one")
    if calls.get(name, 0) != 1:
        raise UserError(
            f"the unit {name} is called {calls.get(name, 0)} times per forward; name a module that is called once"
        )
    outer = [other for other in named if other != name and _inside(name, other)]
    if outer or named.count(name) > 1:
        raise UserError(f"the unit {name} is inside the unit {(outer or [name])[0]}; name one of them")
