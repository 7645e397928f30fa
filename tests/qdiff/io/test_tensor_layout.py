"""The table of a network's layers in two layouts, on a block with everything that occurs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdiff.errors import UserError
from qdiff.interface import AttentionCore
from qdiff.io.tensor_layout import Divided, layout_of

# Rows of ours for q, k and v: two heads of one channel, each with its q, k and v together.
ROWS = tuple(torch.tensor(rows) for rows in ([0, 3], [1, 4], [2, 5]))


class Block(nn.Module):
    """An attention whose layer computes q, k and v at once, and 1×1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.core, self.out = nn.Conv1d(2, 6, 1), AttentionCore(), nn.Conv2d(2, 2, 1, bias=False)
        self.shortcut = None


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Conv2d(1, 2, 3), nn.ModuleList([Block()])


def theirs() -> dict[str, torch.Tensor]:
    """Return the tensors of the other network, all zero."""
    made = {f"attention.to_{name}": nn.Linear(2, 2) for name in "qkv"}
    made |= {"attention.to_out": nn.Linear(2, 2, bias=False), "stem": nn.Conv2d(1, 2, 3)}
    return {
        f"{name}.{kind}": torch.zeros_like(value) for name, m in made.items() for kind, value in m.named_parameters()
    }


TABLE = {"qkv": Divided(("to_q", "to_k", "to_v"), ROWS), "out": "to_out", "shortcut": "missing_here"}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Ours()


@pytest.fixture
def layout(network):
    return layout_of(network, [("first", "stem"), ("blocks.0", "attention")], {Block: lambda _: TABLE})


def test_the_table(layout):
    assert [(pair.ours, pair.theirs) for pair in layout.layers] == [
        ("first", ("stem",)),
        ("blocks.0.qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
        ("blocks.0.out", ("attention.to_out",)),
    ]
    assert layout.attentions == {"blocks.0.core": "attention"}


def test_rows_and_shapes_there_and_back(network, layout):
    state = network.state_dict()
    there = layout.to_theirs(state, theirs(), "x")
    qkv = state["blocks.0.qkv.weight"]
    assert torch.equal(there["attention.to_k.weight"], qkv[[1, 4], :, 0])
    assert torch.equal(there["attention.to_v.bias"], state["blocks.0.qkv.bias"][[2, 5]])
    assert {name: value.shape for name, value in there.items()} == {n: v.shape for n, v in theirs().items()}
    back = layout.to_ours(there, state, "x")
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("first.bias"), r"x has no tensor for stem\.bias of diffusers' network; give"),
        (
            lambda s: s.update({"more.weight": torch.ones(1)}),
            r"x has the tensor more\.weight, which diffusers'",
        ),
        (lambda s: s.update({"first.scale": torch.ones(1)}), r"x has the tensor stem\.scale, which"),
        (lambda s: s.update({"first.weight": torch.ones(2, 1, 1, 3)}), r"x has another shape for stem\.weight than"),
        (lambda s: s.update({"blocks.0.out.weight": torch.ones(2, 2, 1, 3)}), r"another shape for attention\.to_out"),
    ],
)
def test_each_tensor_needs_its_partner(network, layout, change, match):
    state = dict(network.state_dict())
    change(state)
    with pytest.raises(UserError, match=match):
        layout.to_theirs(state, theirs(), "x")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("attention.to_k.bias"), r"x has no tensor for blocks\.0\.qkv\.bias of the papers' network"),
        (lambda s: s.update({"attention.to_k.scale": torch.ones(1)}), r"the tensor attention\.to_k\.scale, which"),
        (lambda s: s.update({"other.weight": torch.ones(1)}), r"x has the tensor other\.weight"),
    ],
)
def test_and_on_the_way_back(network, layout, change, match):
    state = theirs()
    change(state)
    with pytest.raises(UserError, match=match):
        layout.to_ours(state, network.state_dict(), "x")
