"""What one forward calls, and the units that two traced forwards find."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from traced_networks import UNITS, WIDTH, Block, SkipNetwork, inputs, leaves_of, made

from qdiff.errors import UserError
from qdiff.tracing.rows import Count, Rows
from qdiff.tracing.trace import count_calls, trace_units


def traced(network, given=None, **options):
    given = (torch.randn(3, 3, WIDTH, dtype=torch.float64),) if given is None else given
    return {unit.name: unit for unit in trace_units(network, given, leaves_of(network), **options)}


def test_calls_are_counted_by_module():
    calls = count_calls(made(SkipNetwork), inputs(2))
    assert calls.modules["blocks.0"] == calls.modules["middle.qkv"] == calls.modules[""] == 1
    assert calls.attention == {"middle": 1} and calls.products == ()


class Unused(nn.Module):
    """One layer is never called, under two names; another's weight is used without a call."""

    def __init__(self):
        super().__init__()
        self.used, self.tied, self.never = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.alias = self.never

    def forward(self, x):
        return F.linear(self.used(x), self.tied.weight)


def test_layers_that_are_never_called_are_named():
    network = made(Unused)
    given = (torch.randn(2, 3, WIDTH, dtype=torch.float64),)
    assert count_calls(network, given).never_called(network) == ["tied", "never", "alias"]
    assert list(traced(network)) == ["used"]


def test_products_of_two_activations_are_named():
    class Bilinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.eye(WIDTH))

        def forward(self, x):
            h = self.layer(x)
            return torch.einsum("nld,nmd->nlm", h, h) @ x @ self.weight

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = Bilinear(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return torch.matmul(self.last(self.inner(x)), self.inner.weight)

    x = torch.randn(1, 3, WIDTH, dtype=torch.float64)
    assert count_calls(made(Around), (x,)).products == ("inner",)


def test_units_in_execution_order_with_their_last_use():
    units = traced(made(SkipNetwork), inputs(3))
    assert list(units) == UNITS
    order = {name: index for index, name in enumerate(UNITS)}
    assert {name: unit.until for name, unit in units.items()} == {
        "embedding": order["blocks.1"],  # what is computed from it between units, too
        "head": order["last"],
        "blocks.0": order["middle"],
        "middle": order["blocks.1"],
        "blocks.1": order["last"],
        "last": len(UNITS),
    }


def test_what_a_call_is_made_of():
    """Samples, counts of samples, and constants, in nested arguments and outputs."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, parts, *, count, table, mask, mode):
            h = self.one(parts["h"]) + self.two(parts["h"]) + mask.unflatten(0, (count, 2)).sum()
            return {"h": h * table, "rows": count, "mode": mode}

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = Inner(), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            mask = x.new_zeros(2 * len(x), 3, 3)
            found = self.inner({"h": x}, count=len(x), table=x.new_ones(WIDTH), mask=mask, mode="sum")
            return self.last(found["h"])

    unit = traced(made(Around))["inner"]
    assert unit.inputs == [Rows(), Count(1), None, Rows(2), None]
    assert unit.outputs == [Rows(), Count(1), None]


def in_place(change):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.ReLU(change), nn.Linear(WIDTH, WIDTH))
            self.last.append(nn.Linear(WIDTH, WIDTH))

        def forward(self, x):
            h = self.first(x)
            if not change:
                h += 1
            return self.last(h)

    return InPlace


def test_changes_in_place_are_noted():
    between = traced(made(in_place(False)), named=["last"])
    assert between["first"].output_changed and not between["last"].changes_inputs
    inside = traced(made(in_place(True)), named=["last"])
    assert inside["last"].changes_inputs and not inside["first"].changes_inputs


def refused(forward, message, **options):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.block = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), Block()

        def forward(self, x):
            return forward(self, x)

    with pytest.raises(UserError, match=message) as raised:
        traced(made(Network), **options)
    assert str(raised.value).count("; ") == 1, "not one sentence"


def test_samples_that_mix_are_refused():
    refused(
        lambda net, x: net.last(net.first(x) - x.mean(0)),
        "the input of last depends on what else is in the batch; .*SteppedNetwork",
    )
    refused(lambda net, x: net.last(net.first(x)) - x.mean(0), "the output of the network depends on what else")


def test_samples_along_another_dimension_are_refused():
    refused(lambda net, x: net.last(net.first(x).transpose(0, 1)).transpose(0, 1), r"the input of last has the shape")


def test_a_batch_size_in_a_number_that_is_no_count_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x, scale):
            return super().forward(x) * scale

    def forward(net, x):
        net.last.__class__ = Scaled
        return net.last(net.first(x), 1 / len(x))

    refused(forward, "the input of last is 1.0 for one sample and 0.5 for two")


def test_units_without_samples_are_refused():
    refused(
        lambda net, x: net.first(x) + net.last(net.first.weight[:1]), "the input of last depends on nothing but const"
    )


def test_a_path_that_depends_on_the_batch_is_refused():
    refused(
        lambda net, x: net.last(x) if len(x) == 1 else net.first(x), "calls other modules for two samples than for one"
    )


def test_a_layer_that_is_called_by_two_units_is_refused():
    """Through a reference that is not registered, so that it shows only when the network runs."""

    class Borrower(Block):
        def forward(self, h, embedding, borrowed):
            return super().forward(borrowed(h), embedding)

    def forward(net, x):
        net.block.__class__ = Borrower
        return net.first(net.block(x, x[:, 0], net.last))

    refused(forward, "last of the unit last is called inside the unit block", named=["block", "last"])


def test_a_part_of_a_unit_that_is_called_once_more_repeats():
    """As DiT's embedding, which is in its first block and is called again for the output."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.last = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            h = self.blocks[1](self.blocks[0](x, x[:, 0]), x[:, 0])
            return self.last(h + self.blocks[0].first(x)) + self.blocks[0].first(h)

    units = trace_units(network := made(Network), (torch.randn(2, 3, WIDTH).double(),), leaves_of(network))
    assert [(unit.name, unit.repeats, unit.until) for unit in units] == [
        ("blocks.0", False, 1),
        ("blocks.1", False, 4),
        ("blocks.0.first", True, 3),
        ("last", False, 5),
        ("blocks.0.first", True, 5),
    ]


def test_a_part_of_a_unit_that_is_called_before_it_is_refused():
    refused(
        lambda net, x: net.block(net.block.first(x), x[:, 0]),
        "block.first of the unit block is called before this unit; name a module around both calls",
    )


def test_batches_of_one_sample_do():
    network = made(SkipNetwork)
    assert list(traced(network, inputs(1))) == UNITS
