"""The tensors of one network in two layouts: the papers' (ours) and that of the diffusers library (theirs).

A `NetworkLayout` is the complete table of a network's layers; a family makes it with `layout_of` by walking its
network. Nothing here knows a family, or imports diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.interface import AttentionCore

State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Divided:
    """The layers of theirs that together hold one layer of ours, e.g. the projections to q, k and v.

    Attributes:
        names: their names inside the block.
        rows: the output channels of ours that each of them has, int64, in their order; together a permutation.
    """

    names: tuple[str, ...]
    rows: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class LayerPair:
    """A layer of ours, and the layers of theirs with the same numbers.

    A weight has the same shape in both, except that a 1×1 convolution [O, I, 1, 1] may be a linear layer [O, I].

    Attributes:
        ours: dotted name of our layer.
        theirs: dotted names of their layers; more than one if ours is divided by output channels.
        rows: see `Divided`; None if there is one layer, with all output channels.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[Tensor, ...] | None = None

    def divided(self, value: Tensor) -> list[Tensor]:
        """Return the part of a tensor of ours, output channels first, that each of ``theirs`` has."""
        return [value] if self.rows is None else [value[rows] for rows in self.rows]

    def united(self, parts: list[Tensor]) -> Tensor:
        """Undo `divided`."""
        if self.rows is None:
            return parts[0]
        joined = torch.cat(parts)
        whole = torch.empty_like(joined)
        whole[torch.cat(self.rows)] = joined
        return whole


Table = Mapping[str, str | Divided]
"""Names of layers inside a block of ours → their names inside the block of theirs."""


@dataclass(frozen=True, eq=False)
class NetworkLayout:
    """How the layers of a network of ours are named and divided in theirs.

    Attributes:
        layers: every layer with parameters, in the order of ours.
        attentions: names of our `AttentionCore`s → names of their attention modules.
    """

    layers: tuple[LayerPair, ...]
    attentions: Mapping[str, str]

    def to_theirs(self, state: State, expected: State, origin: str) -> dict[str, Tensor]:
        """Return the tensors of our network under the names and in the shapes of theirs.

        Args:
            state: the tensors of our network.
            expected: the tensors of their network, e.g. on the meta device; only names and shapes are used.
            origin: what is converted, for error messages.

        Raises:
            UserError: a tensor has no partner in the other network, or one of another shape.
        """
        left, made = _by_layer(state), {}
        for pair in self.layers:
            for kind, value in left.pop(pair.ours, {}).items():
                parts = zip(pair.theirs, pair.divided(value), strict=True)
                made |= {f"{name}.{kind}": part for name, part in parts}
        return _fitted(made, expected, left, origin, "diffusers' network")

    def to_ours(self, state: State, expected: State, origin: str) -> dict[str, Tensor]:
        """Undo `to_theirs`: ``state`` has the tensors of their network, ``expected`` those of ours."""
        left, made = _by_layer(state), {}
        for pair in self.layers:
            parts = [left.get(name, {}) for name in pair.theirs]
            for kind in set.intersection(*map(set, parts)):
                made[f"{pair.ours}.{kind}"] = pair.united([part.pop(kind) for part in parts])
        return _fitted(made, expected, left, origin, "the papers' network")


def layout_of(
    network: nn.Module,
    modules: Iterable[tuple[str, str]],
    tables: Mapping[type[nn.Module], Callable[[nn.Module], Table]],
) -> NetworkLayout:
    """Return the layout of a network of ours.

    Args:
        network: may be on the meta device.
        modules: dotted names (ours, theirs) of blocks and of layers outside blocks.
        tables: class of a block of ours → the table of its layers; layers without parameters may be in it.
    """
    used = {name.rpartition(".")[0] for name, _ in network.named_parameters()}
    layers: list[LayerPair] = []
    attentions: dict[str, str] = {}
    for ours, theirs in modules:
        block = network.get_submodule(ours)
        table = tables[type(block)](block) if type(block) in tables else {"": ""}
        for name, other in table.items():
            mine = _inside(ours, name)
            if mine not in used:
                continue
            if isinstance(other, Divided):
                layers.append(LayerPair(mine, tuple(_inside(theirs, n) for n in other.names), other.rows))
            else:
                layers.append(LayerPair(mine, (_inside(theirs, other),)))
        for name, module in block.named_modules():
            if isinstance(module, AttentionCore):
                # Where a block has several attentions, both layouts give them one name.
                attentions[_inside(ours, name)] = _inside(theirs, name.rpartition(".")[0])
    return NetworkLayout(tuple(layers), attentions)


def _inside(module: str, name: str) -> str:
    return f"{module}.{name}" if module and name else module or name


def _by_layer(state: State) -> dict[str, dict[str, Tensor]]:
    """Group tensors by layer: layer → ``weight`` or ``bias`` → tensor."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        layers.setdefault(layer, {})[kind] = tensor
    return layers


def _fitted(made: State, expected: State, left: Mapping[str, State], origin: str, target: str) -> dict[str, Tensor]:
    """Return tensors in the shapes of ``expected``; ``left`` are those that the table does not name."""
    surplus = [f"{layer}.{kind}" for layer, kinds in left.items() for kind in kinds]
    surplus += sorted(made.keys() - expected.keys())
    missing = sorted(expected.keys() - made.keys())
    shapes = sorted(n for n in made.keys() & expected.keys() if _plain(made[n]) != _plain(expected[n]))
    for names, what in (
        (missing, f"has no tensor for {{}} of {target}"),
        (surplus, f"has the tensor {{}}, which {target} does not have"),
        (shapes, f"has another shape for {{}} than {target}"),
    ):
        if names:
            raise UserError(f"{origin} {what.format(names[0])}; give the config and the weights of one model")
    return {name: made[name].reshape(like.shape) for name, like in expected.items()}


def _plain(weight: Tensor) -> tuple[int, ...]:
    """Return a weight's shape, that of a 1×1 convolution as of a linear layer."""
    shape = tuple(weight.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
