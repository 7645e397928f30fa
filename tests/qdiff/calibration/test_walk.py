"""The walk: values, cost and order, against hooks on the whole network."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.walk import (
    Walker,
    leaf_inputs_and_output,
    leaves_in_execution_order,
    rows_of,
    walk,
)
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.interface import Step, SteppedNetwork
from qdiff.modes import LEAVES
from qdiff.quant_model import QuantModel

# Relative L2: a batch of 5 and a batch of 12 take other kernels, which sum in another order.
ACTIVATION_TOLERANCE = 1e-5

# Activations far from any rounding edge are not needed here: weights alone are quantized where values are compared.
W4 = {"weight_bits": 4, "split_shortcut": True}


@pytest.fixture
def tiny_config(tiny_config):
    """Two channels a norm group: with one, the norm takes out what the time embedding adds."""
    tiny_config.model.ch = 64
    return tiny_config


@contextlib.contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def full_activations(network, inputs):
    """{step: (inputs, output)} of one forward of the whole network, by hooks."""
    seen = {}
    with contextlib.ExitStack() as stack:
        for step in list(network.steps()):
            hook = lambda m, args, out, name=step.name: seen.__setitem__(name, (args, out))  # noqa: E731
            stack.enter_context(hooked(step.module, hook))
        network(*inputs)
    return seen


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("batch_size", [5, 64])
def test_walk_equals_the_full_network(calibrated, data, relative, budget, batch_size):
    qnn = calibrated(**W4)
    in_float = full_activations(qnn.model, data.inputs)
    with qnn.quantized(activations=False):
        in_quantized = full_activations(qnn.model, data.inputs)
    walker = Walker(ActivationStorage(budget), torch.device("cpu"), batch_size)
    names = []
    for _, step, unit, _ in walk(qnn.model, data.inputs, walker, weights=True, activations=False):
        names.append(step.name)
        for got, expected in zip(unit.float_inputs, in_float[step.name][0], strict=True):
            assert relative(got, expected) < ACTIVATION_TOLERANCE
        assert relative(unit.target, in_float[step.name][1]) < ACTIVATION_TOLERANCE
        for got, expected in zip(unit.inputs, in_quantized[step.name][0], strict=True):
            assert relative(got, expected) < ACTIVATION_TOLERANCE
        last, target = unit.inputs[0], unit.target
    assert names == [step.name for step in qnn.model.steps()]
    assert relative(last, in_float[names[-1]][0][0]) > ACTIVATION_TOLERANCE, "quantization left no trace"
    assert unit.inputs == () and len(unit.target) == 0, "the walk went on and its last unit holds activations"
    assert relative(target * 1.01, in_float[names[-1]][1]) > ACTIVATION_TOLERANCE


def test_walk_costs_one_forward_of_each_block(calibrated, data, walker):
    """One float and one quantized: O(blocks), not O(blocks²)."""
    qnn = calibrated(**W4)
    calls = dict.fromkeys((step.name for step in qnn.model.steps()), 0)
    with contextlib.ExitStack() as stack:
        for step in qnn.model.steps():
            hook = lambda *_, name=step.name: calls.__setitem__(name, calls[name] + 1)  # noqa: E731
            stack.enter_context(hooked(step.module, hook))
        for _ in walk(qnn.model, data.inputs, walker, weights=True, activations=False):
            pass
    assert set(calls.values()) == {2}, calls


def test_a_unit_sees_what_was_fitted_before_it(calibrated, data, walker):
    """Inputs come from the network as quantized so far, fitted units included."""
    qnn, names = calibrated(**W4), []
    for _, step, unit, _ in walk(qnn.model, data.inputs, walker, weights=True, activations=False):
        names.append(step.name)
        if step.name == "conv_in":
            layer = unit.module
            layer.set_weight_int(layer.weight_quantizers[0].zero_point.expand_as(layer.weight))  # all weights 0
        if step.name == "down.0.block.0":
            expected = layer.bias[None, :, None, None].expand_as(unit.inputs[0])
            assert torch.equal(unit.inputs[0], expected)
            assert not torch.equal(unit.float_inputs[0], expected)
            return
    pytest.fail(f"never came to the block: {names}")


@pytest.mark.slow
def test_walk_leaves_no_mode_behind(calibrated, data, walker):
    qnn = calibrated(**W4, act_bits=8)
    for index, *_ in walk(qnn.model, data.inputs, walker, weights=True, activations=True):
        assert not any(m.acts_quantized for m in qnn.modules() if isinstance(m, LEAVES))
        if index == 3:
            break
    assert not any(m.acts_quantized for m in qnn.modules() if isinstance(m, LEAVES))


def executed(module, *inputs):
    order = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        for leaf in module.modules():
            if isinstance(leaf, LEAVES):
                stack.enter_context(hooked(leaf, lambda m, *_: order.append(m)))
        module(*inputs)
    return order


def test_steps_visit_leaves_in_execution_order(calibrated, data, walker):
    qnn = calibrated(**W4)
    expected = executed(qnn, *(i[:1] for i in data.inputs))
    walked = []
    for _, _, unit, _ in walk(qnn.model, data.inputs, walker, weights=True, activations=False):
        walked += [leaf for _, leaf in leaves_in_execution_order(unit.module, unit.inputs, walker)]
    assert walked == expected
    registered = [m for m in qnn.modules() if isinstance(m, LEAVES)]
    assert set(registered) == set(walked)
    assert registered != walked, "registration and execution order agree: the test is blind"


class Backwards(SteppedNetwork):
    """Registers its layers in the opposite order of their use."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3, 1)
        self.middle = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        self.first = nn.Linear(2, 4)

    def start(self, x):
        return {"x": x, "h": x}

    def steps(self):
        for name in ("first", "middle", "last"):
            yield Step(name, getattr(self, name), lambda s: (s["h"],), lambda s, out: s.__setitem__("h", out))


def test_registration_order_does_not_matter(walker):
    qnn = QuantModel(Backwards(), QuantConfig(4))
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)
    x = torch.randn(7, 2)
    names = [s.name for _, s, _, _ in walk(qnn.model, (x,), walker, weights=True, activations=False)]
    assert names == ["first", "middle", "last"]
    assert [n for n, _ in leaves_in_execution_order(qnn.model, (x,), walker)] == ["first", "middle.0", "last"]


def test_leaf_capture_equals_a_hook(calibrated, data, walker, relative):
    qnn = calibrated(**W4)
    leaf, seen = qnn.model.mid.attn_1.core, []
    *got, output = leaf_inputs_and_output(qnn.model, leaf, data.inputs, Walker(walker.storage, walker.device, 5))
    with hooked(leaf, lambda m, args, out: seen.extend([*args, out])), torch.no_grad():
        qnn(*data.inputs)
    for a, b in zip([*got, output], seen, strict=True):
        assert relative(a, b) < ACTIVATION_TOLERANCE < relative(a * 1.01, b)
    assert not leaf._forward_hooks


@torch.no_grad()
def test_leaf_capture_is_from_before_changes_in_place(walker):
    network, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)), torch.randn(7, 3)
    qnn = QuantModel(network, QuantConfig(4))
    taken, output = leaf_inputs_and_output(network, network[0], (x,), walker)
    assert torch.equal(taken, x) and torch.equal(output, qnn.model[0](x)) and (output < 0).any()


@torch.no_grad()
def test_leaf_capture_of_several_rows_and_calls_per_sample(walker):
    """Each row is fitted as a sample; what belongs together stays together."""

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(self.layer(x.flatten(0, 1)).relu()).unflatten(0, (len(x), -1))

    # Integers, whose sums are exact: another number of rows has other last bits on some CPUs.
    network, x = Folded(), torch.randint(-9, 10, (7, 2, 3)).float()
    for parameter in network.parameters():
        parameter.copy_(torch.randint(-9, 10, parameter.shape))
    QuantModel(network, QuantConfig(4))
    taken, output = leaf_inputs_and_output(network, network.layer, (x,), Walker(walker.storage, walker.device, 3))
    assert taken.shape == output.shape == (7 * 2 * 2, 3) and torch.equal(network.layer(taken), output)
    assert {tuple(row) for row in x.flatten(0, 1).tolist()} <= {tuple(row) for row in taken.tolist()}


@torch.no_grad()
def test_leaf_capture_of_several_shapes_is_refused(walker):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) + self.layer(x.mean(1, keepdim=True))

    network = Pooled()
    QuantModel(network, QuantConfig(4))
    with pytest.raises(UserError, match="called with several shapes"):
        leaf_inputs_and_output(network, network.layer, (torch.randn(7, 2, 3),), walker)


def test_leaf_capture_removes_its_hook_after_an_error(calibrated, data, walker):
    qnn = calibrated(**W4)
    leaf = qnn.model.conv_out
    with pytest.raises(TypeError):
        leaf_inputs_and_output(qnn.model, leaf, (data.inputs[0],), walker)
    assert not leaf._forward_hooks


def test_rows_are_views():
    state = {"x": torch.arange(6.0).reshape(3, 2), "skips": [torch.arange(3)], "other": "kept"}
    part = rows_of(state, slice(1, 3))
    assert part["x"].tolist() == [[2, 3], [4, 5]] and part["skips"][0].tolist() == [1, 2] and part["other"] == "kept"
    part["x"].fill_(0)
    assert state["x"][1:].sum() == 0


def test_map_stores_all_rows_whatever_the_batch():
    x = torch.arange(11.0)
    for batch_size in (1, 3, 11, 50):
        walker = Walker(ActivationStorage(), torch.device("cpu"), batch_size)
        double, square = walker.map(lambda rows: (x[rows] * 2, x[rows] ** 2), len(x))
        assert torch.equal(double, x * 2) and torch.equal(square, x**2)


def test_released_as_the_walk_advances(calibrated, data):
    """What stays is the network's state, not every unit's inputs and targets."""
    storage = ActivationStorage()
    qnn, sizes = calibrated(**W4), []
    for _, step, _, _ in walk(qnn.model, data.inputs, Walker(storage, qnn.device), weights=True, activations=False):
        sizes.append((step.name, storage.in_ram))
    by_name = copy.copy(dict(sizes))
    assert by_name["conv_out"] < storage.peak, sizes
    unit_bytes = 12 * 64 * 64 * 4  # one activation of 64 channels at 8×8
    # At the end no skip is left: at most the unit's two inputs and target, the states before it, and small embeddings.
    assert by_name["conv_out"] < 8 * unit_bytes, sizes
