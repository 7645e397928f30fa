"""A forward replayed step by step: the same output, stored outputs dropped in time, and nothing stale."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from traced_networks import UNITS, WIDTH, Block, Repeating, SkipNetwork, inputs, leaves_of, made

from qdiff.errors import UserError
from qdiff.tracing.replay import OUTPUT, ReplayedNetwork

# Relative L2 in float64: sums in the order of another batch size.
TOLERANCE = 1e-9


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 3, WIDTH, generator=generator, dtype=torch.float64),)


def replayed(network, given=None, **options):
    given = tokens(3) if given is None else given
    return ReplayedNetwork(network, given, leaves_of(network), **options)


@torch.no_grad()
def step_by_step(network, given, batch=2):
    """Return the output as the walk computes it: each step's inputs and output for some samples at a time."""
    state = network.start(*given)
    for step in network.steps():
        rows = [slice(i, i + batch) for i in range(0, len(given[0]), batch)]
        parts = [step.inputs({k: v[r] for k, v in state.items()}) for r in rows]
        stored = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        step.output(state, torch.cat([step.module(*(i[r] for i in stored)) for r in reversed(rows)][::-1]))
    return state["h"]


def is_the_same(network, given, relative):
    """Whether replays equal the forward, for other samples than were traced."""
    view = replayed(network, tuple(i[:2] for i in given))
    with torch.no_grad():
        expected = network(*given)
    for output in (view(*given).detach(), step_by_step(view, given)):
        assert relative(output, expected) < TOLERANCE < relative(output * (1 + 1e-8), expected)
    return view


def test_equals_the_forward(relative):
    view = is_the_same(made(SkipNetwork), inputs(5, seed=1), relative)
    assert [step.name for step in view.steps()] == [*UNITS, OUTPUT]


def test_outputs_are_dropped_after_their_last_use():
    network = made(SkipNetwork)
    view, held = replayed(network, inputs(3)), []
    state = view.start(*inputs(4))
    for step in view.steps():
        step(state)
        held.append(sorted(int(key.split()[1]) for key in state if key.startswith("unit")))
    # Of embedding, head, blocks.0, middle, blocks.1, last: the skip and the embedding live on.
    assert held == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [1, 4], [5], [5]]


def test_a_use_of_what_was_dropped_shows():
    """NaN takes the place of dropped outputs, and the output is computed from those that are left."""
    network = made(SkipNetwork)
    view = replayed(network, inputs(3))
    given, index = inputs(4), UNITS.index("head")
    assert torch.isfinite(view(*given)).all()
    view.units[index].until = index  # as if nothing used it afterwards
    assert view(*given).isnan().all()


def test_uses_that_autograd_does_not_see_keep_all_outputs(relative):
    class Detached(SkipNetwork):
        def forward(self, x, t):
            embedding = self.embedding(t[:, None].double() / 1000)
            skip = self.head(x)
            h = self.blocks[1](self.middle(self.blocks[0](skip, embedding)), embedding)
            return self.last(torch.cat([h, skip.detach()], dim=-1))

    view = is_the_same(made(Detached), inputs(5), relative)
    assert {unit.until for unit in view.units} == {len(UNITS)}


class InPlace(nn.Module):
    """Changes in place: of a unit's output by what follows, and of a unit's inputs by the unit."""

    class Rectified(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.rectify = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.two(self.rectify(self.one(self.rectify(x))))

    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(WIDTH, WIDTH), self.Rectified(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.first(x)
        skip = h.clone()
        skip += x.mul_(2)
        return self.last(self.block(h) + skip)


def test_changes_in_place(relative):
    network, given = made(InPlace).eval(), tokens(5)
    with torch.no_grad():
        expected = network(given[0].clone())
    view = ReplayedNetwork(network, tokens(2), leaves_of(network), named=["block"])
    for output in (view(*given), step_by_step(view, given)):
        assert relative(output.detach(), expected) < TOLERANCE
    assert torch.equal(given[0], tokens(5)[0]), "the samples themselves were changed"


def test_a_unit_leaves_its_stored_inputs_alone():
    network = made(InPlace)
    view = ReplayedNetwork(network, tokens(2), leaves_of(network), named=["block"])
    state = view.start(*tokens(4))
    for step in view.steps():
        stored = step.inputs(state)
        before, first = [i.clone() for i in stored], step.module(*stored)
        assert all(torch.equal(a, b) for a, b in zip(stored, before, strict=True)), step.name
        assert torch.equal(step.module(*stored), first)
        step.output(state, first)


class Joint(nn.Module):
    """Blocks with several outputs of several kinds, and arguments in dicts and by keyword."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, both, *, batch_size, scale=1.0):
            text = self.two(both["text"])
            index = text[:, 0].argmax(-1)
            found = {"image": self.one(both["image"]) * scale, "text": text.float(), "index": index, "none": None}
            return found, batch_size

    def __init__(self):
        super().__init__()
        self.pairs, self.last = nn.ModuleList([self.Pair(), self.Pair()]), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, context):
        both = {"image": x, "text": context}
        for pair in self.pairs:
            both, count = pair(both, batch_size=len(x), scale=0.5)
            both = {**both, "text": both["text"].to(x.dtype)}
        chosen = both["text"].gather(1, (both["index"] % 2)[:, None, None].expand(-1, 1, WIDTH))
        return self.last(both["image"].view(count, 3, WIDTH) + chosen)


def test_several_outputs_of_several_kinds(relative):
    network, given = made(Joint), (*tokens(5), *tokens(5, seed=1))
    view = is_the_same(network, given, relative)
    step = next(iter(view.steps()))
    joined = step.module(*step.inputs(view.start(*given)))
    assert joined.shape == (5, 3 * WIDTH + 3 * WIDTH + 1)


class Masked(nn.Module):
    """A mask with a row per sample and head, as older attention takes it."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, h, mask):
            scores = torch.einsum("nlhd,nmhd->nhlm", self.one(h).unflatten(-1, (2, -1)), h.unflatten(-1, (2, -1)))
            weights = (scores.flatten(0, 1) + mask).softmax(-1).unflatten(0, (-1, 2))
            return h + self.two((weights @ h.unflatten(-1, (2, -1)).transpose(1, 2)).transpose(1, 2).flatten(2))

    def __init__(self):
        super().__init__()
        self.heads, self.last = self.Heads(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, lengths):
        mask = torch.where(torch.arange(3)[None, None] < lengths[:, None, None], 0.0, -1e4).double()
        slopes = torch.tensor([1.0, 0.5], dtype=torch.float64)  # per head
        return self.last(self.heads(x, (mask[:, None] * slopes[:, None, None]).flatten(0, 1)))


def test_masks_with_a_row_per_head(relative):
    view = is_the_same(made(Masked), (*tokens(5), torch.tensor([2, 3, 1, 3, 2])), relative)
    heads = view.units[0]
    assert heads.inputs[1].per_sample == 2


def test_integers_come_first(relative):
    """The placeholder of a dropped output has its own dtype, whatever the network's first input is."""

    class Words(SkipNetwork):
        def forward(self, words, t):
            return super().forward(F.one_hot(words, WIDTH).double(), t)

    is_the_same(made(Words), (torch.tensor([[0, 1, 3]] * 4), torch.arange(4)), relative)


class Keeping(SkipNetwork):
    """Reads what its middle kept of its last forward, beside what that returned."""

    scale = 1.0

    class attention(SkipNetwork.attention):
        def forward(self, h):
            self.kept = super().forward(h)
            return self.kept

    def forward(self, x, t):
        return self.scale * (super().forward(x, t) + 0.01 * self.middle.kept)


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_unit_that_hands_on_more_than_it_returns_is_refused(scale, monkeypatch):
    """At the scale of the output, however small it is."""
    monkeypatch.setattr(Keeping, "scale", scale)
    with pytest.raises(UserError, match="Keeping cannot be cut into units: a replayed forward gives another output"):
        replayed(made(Keeping), inputs(2))


def test_a_named_unit_is_one_step(relative):
    network = made(SkipNetwork)
    view = replayed(network, inputs(2), named=["blocks.0.first"])
    names = [step.name for step in view.steps()]
    assert names == ["embedding", "head", "blocks.0.first", "blocks.0.second", *UNITS[3:], OUTPUT]
    with torch.no_grad():
        assert relative(step_by_step(view, inputs(5)), network(*inputs(5))) < TOLERANCE


def test_a_call_of_the_users_own(relative):
    """Of a network that takes its inputs by other names, and returns more than its output."""

    class Named(SkipNetwork):
        def forward(self, *, sample, timestep):
            return {"sample": super().forward(sample, timestep)}

    def call(network, x, t):
        return network(timestep=t, sample=x)["sample"]

    network = made(Named)
    view = replayed(network, inputs(2), call=call)
    with torch.no_grad():
        assert relative(step_by_step(view, inputs(5)), call(network, *inputs(5))) < TOLERANCE


def test_the_network_is_left_as_it_was():
    network = made(SkipNetwork)
    network.head.forward = forward = network.head.forward  # as libraries do that wrap a module's forward
    view = replayed(network, inputs(2))
    with pytest.raises(RuntimeError):
        view(torch.zeros(2, 3, WIDTH + 1).double(), torch.zeros(2))
    assert network.head.forward is forward and "forward" not in vars(network.last)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert torch.is_grad_enabled()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, of pickling its trees
def test_copies_are_independent():
    view = replayed(made(SkipNetwork), inputs(2))
    twin = copy.deepcopy(view)
    nn.init.zeros_(twin.network.last.weight)
    assert not torch.equal(twin(*inputs(2)), view(*inputs(2)))
    assert torch.equal(pickle.loads(pickle.dumps(view))(*inputs(2)), view(*inputs(2)))


def test_blocks_in_a_list_that_is_shared_are_the_networks_output(relative):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x, x[:, 0])
            return x

    view = is_the_same(made(Chain), tokens(5), relative)
    assert [unit.until for unit in view.units] == [1, 2]


def test_repeated_parts(relative):
    view = is_the_same(made(Repeating), inputs(5), relative)
    assert [step.is_unit for step in view.steps()] == [True, True, False, True, False, False]
