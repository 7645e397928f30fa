"""Which modules are units of reconstruction: blocks where there are any, layers between them, and what users name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from traced_networks import UNITS, WIDTH, Block, SkipNetwork, inputs, leaves_of, made

from qdiff.errors import UserError
from qdiff.tracing.trace import count_calls
from qdiff.tracing.units import candidates, choose_units


def units_of(network, given=None, named=None):
    given = (torch.randn(2, 3, WIDTH, dtype=torch.float64),) if given is None else given
    return choose_units(network, leaves_of(network), count_calls(network, given).modules, named)


def test_blocks_and_the_layers_between_them():
    assert sorted(units_of(made(SkipNetwork), inputs(2))) == sorted(UNITS)


def test_every_layer_is_in_one_unit():
    network = made(SkipNetwork)
    held = [leaf for name in units_of(network, inputs(2)) for leaf in network.get_submodule(name).modules()]
    held = [leaf for leaf in held if leaf in leaves_of(network)]
    assert len(held) == len(set(held)) and set(held) == leaves_of(network)


def test_a_network_that_is_one_layer():
    assert units_of(made(nn.Linear, WIDTH, WIDTH)) == [""]


class Nested(nn.Module):
    """Lists of blocks inside a module that is called as a whole, and sequences of single layers inside the blocks."""

    def __init__(self):
        super().__init__()
        sequence = lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))  # noqa: E731
        self.stage = nn.Sequential(sequence(), nn.Sequential(sequence(), sequence()))
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.last(self.stage(x))


def test_lists_of_blocks_are_looked_into():
    assert units_of(made(Nested)) == ["stage.0", "stage.1.0", "stage.1.1", "last"]


class CalledByTheirChildren(nn.Module):
    """A module that is never called itself."""

    def __init__(self):
        super().__init__()
        self.pair = Block()

    def forward(self, x):
        return self.pair.second(self.pair.first(x))


def test_children_of_what_is_never_called():
    assert units_of(made(CalledByTheirChildren)) == ["pair.first", "pair.second"]


class Repeated(nn.Module):
    """A block is called twice in a forward of the module around it."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.other = Block(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.block(self.other(self.block(x, x[:, 0])), x[:, 0])

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), self.Inner()

    def forward(self, x):
        return self.inner(self.first(x))


def test_what_is_called_twice_is_inside_its_unit():
    assert units_of(made(Repeated)) == ["first", "inner"]


def test_a_named_unit_inside_of_what_must_be_one_unit_is_refused():
    with pytest.raises(UserError, match=r"inner\.block is used several .* inner must be one unit, and inner\.other is"):
        units_of(made(Repeated), named=["inner.other"])


class Shared(nn.Module):
    """Two blocks of a list share a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList([Block(), Block(), Block()])
        self.blocks[2].second = self.blocks[0].second

    def forward(self, x):
        for block in self.blocks:
            x = block(self.first(x) if block is self.blocks[0] else x, x[:, 0])
        return x


def test_blocks_that_share_a_layer_are_one_unit():
    """Here nothing smaller than the network holds both and is called."""
    assert units_of(made(Shared)) == [""]
    network = nn.Sequential(Shared(), nn.Linear(WIDTH, WIDTH)).double()
    assert units_of(network) == ["0", "1"]


def test_a_second_name_alone_is_not_sharing():
    network = made(Nested)
    network.also = network.stage[0]
    assert sorted(units_of(network)) == ["last", "stage.0", "stage.1.0", "stage.1.1"]


def test_named_units_are_kept_and_the_rest_is_cut():
    network = made(Nested)
    assert units_of(network, named=["stage.1"]) == ["stage.1", "stage.0", "last"]
    assert units_of(network, named=["stage.0.2"]) == ["stage.0.2", "stage.0.0", "stage.1.0", "stage.1.1", "last"]
    assert units_of(network, named=[""]) == [""]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["stage.7"], "has no module stage.7"),
        (["stage.0.1"], "stage.0.1 holds no layer to quantize"),
        (["stage.1", "stage.1.0"], "the unit stage.1.0 is inside the unit stage.1; name one of them"),
        (["last", "last"], "the unit last is inside the unit last"),
    ],
)
def test_wrong_names(named, message):
    with pytest.raises(UserError, match=message):
        units_of(made(Nested), named=named)


def test_a_named_unit_is_called_once():
    with pytest.raises(UserError, match=r"inner\.block is called 2 times per forward"):
        units_of(made(Repeated), named=["inner.block"])
    with pytest.raises(UserError, match="pair is called 0 times"):
        units_of(made(CalledByTheirChildren), named=["pair"])


def test_layers_that_no_forward_calls_are_in_no_candidate():
    network = made(Nested)
    used = leaves_of(network) - {network.stage[0][0], network.stage[0][2]}
    assert list(candidates(network, used)) == ["stage.1.0", "stage.1.1", "last"]
