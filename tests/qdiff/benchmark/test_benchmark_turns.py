"""Turns of variants, and what their seconds say, on a clock that is known."""

from __future__ import annotations

import contextlib

import pytest
import torch

from qdiff.benchmark.run import compared
from qdiff.benchmark.table import VariantRow
from qdiff.benchmark.timing import Spread, Turns, alternated
from qdiff.benchmark.variants import BASE, VARIANTS, Opened, chosen_variants
from qdiff.errors import UserError
from qdiff.interface import Step, SteppedNetwork


class Clock:
    """Moves on by what each turn takes."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, *seconds: float):
        left = list(seconds)

        def turn() -> tuple[float, int]:
            self.order += name
            started = self.now
            self.now += left.pop(0)
            return self.now - started, 5

        return turn


def test_variants_take_turns():
    clock = Clock()
    turns = {"a": clock.taking("a", 1, 2, 3), "b": clock.taking("b", 4, 4, 4)}
    taken, failures = alternated(turns, 3)
    assert taken == {"a": Turns([1, 2, 3], 5), "b": Turns([4, 4, 4], 5)} and failures == {}
    assert clock.order == "ababab"


def test_one_that_fails_falls_out_and_the_others_go_on():
    clock, left = Clock(), [1.0]

    def dies() -> tuple[float, int]:
        if not left:
            raise UserError("was killed")
        return left.pop(), 5

    taken, failures = alternated({"a": clock.taking("a", 1, 2, 3), "b": dies, "c": clock.taking("c", 4, 5, 6)}, 3)
    assert taken == {"a": Turns([1, 2, 3], 5), "c": Turns([4, 5, 6], 5)}
    assert failures == {"b": "was killed"} and clock.order == "acacac"


def test_medians_and_quartiles():
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(2, 3, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)
    # Turn by turn 2, 4 and 4; of the medians it would be 2.
    assert Spread.of_ratio([0.4, 0.4, 0.8], [0.2, 0.1, 0.2]) == Spread(3, 4, 4)
    with pytest.raises(ValueError):
        Spread.of_ratio([1, 2], [1])


def test_ratios_are_to_float_and_to_the_same_runtimes_float():
    seconds = {"float": [4.0, 6.0, 8.0], "openvino-float": [2.0, 2.0, 2.0], "openvino": [1.0, 2.0, 0.5]}
    taken = {name: Turns(values, 20) for name, values in seconds.items()}
    rows = {name: VariantRow(name) for name in (*seconds, "simulated")}
    assert [row.variant for row in compared(rows, taken)] == list(seconds)
    assert rows["openvino"].seconds == Spread(0.75, 1, 1.5) and rows["openvino"].calls == 20
    assert rows["openvino"].ratio == Spread(3.5, 4, 10) and rows["openvino"].own_ratio == Spread(1.5, 2, 3)
    assert rows["openvino-float"].ratio == Spread(2.5, 3, 3.5) and rows["openvino-float"].own_ratio is None
    assert rows["float"].ratio == Spread(1, 1, 1) and rows["simulated"] == VariantRow("simulated")


def test_there_is_no_ratio_to_what_was_not_measured():
    (row,) = compared({"openvino": VariantRow("openvino")}, {"openvino": Turns([1.0], 1)})
    assert row.seconds == Spread(1, 1, 1) and row.ratio is row.own_ratio is None


def test_names_of_variants():
    assert chosen_variants(None) == list(VARIANTS) and chosen_variants(None)[0] == BASE
    assert chosen_variants("openvino, float,openvino") == ["openvino", "float"]
    with pytest.raises(UserError, match="no 'tensorrt'; choose from float, "):
        chosen_variants("float,tensorrt")
    floats = {name: variant.own_float for name, variant in VARIANTS.items() if variant.own_float}
    assert floats == {"onnxruntime": "onnxruntime-float", "openvino": "openvino-float"}


class Sampler:
    """Stands in for a family: calls the network once for every step, on images of their own numbers."""

    def __init__(self, steps: int, clock: Clock) -> None:
        self.steps, self.clock, self.batches = steps, clock, []

    def sample(self, network, rows) -> None:
        self.batches.append(list(rows))
        for _ in range(self.steps):
            network(torch.zeros(len(rows)), torch.zeros(len(rows)))
            self.clock.now += 2


class Remembering:
    """A network that must be opened for every batch."""

    def __init__(self) -> None:
        self.opened, self.inside, self.gradients = 0, False, None

    def __call__(self, *inputs) -> None:
        assert self.inside, "called outside of a trajectory"
        self.gradients = torch.is_grad_enabled()

    @contextlib.contextmanager
    def trajectory(self):
        self.opened, self.inside = self.opened + 1, True
        yield
        self.inside = False


def test_a_turn_of_sampling_is_one_batch_in_a_trajectory_of_its_own():
    clock, network = Clock(), Remembering()
    model = Sampler(3, clock)
    opened = Opened(network, model, (), batch=2)
    assert network.opened == 1 and clock.now == 6  # the one that warms it up
    assert opened.turn(clock) == (6, 3) and opened.turn(clock) == (6, 3)
    assert network.opened == 3 and not network.inside and network.gradients is False
    assert model.batches == [[0, 1]] * 3


def test_a_turn_of_a_call_is_one_call():
    seen = []
    opened = Opened(lambda *inputs: seen.append(inputs), None, (1, 2, 3), batch=2)
    assert opened.turn(Clock()) == (0, 1) and seen == [(1, 2, 3)] * 2


class TwoSteps(SteppedNetwork):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def start(self, x, t):
        return {"h": x}

    def steps(self):
        for name in ("first", "second"):
            yield Step(name, getattr(self, name), lambda s: (s["h"],), lambda s, out: s.__setitem__("h", out))


def test_stepped_networks_can_be_compiled():
    """In one graph; what turns that into machine code is PyTorch's."""
    network, x = TwoSteps().eval(), torch.ones(3, 2)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, None), network(x, None))
