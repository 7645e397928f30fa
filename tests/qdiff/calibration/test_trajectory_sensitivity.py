"""Sensitivities of a sampler's result: against finite differences, and against what is measured layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qdiff.calibration import trajectory_sensitivity
from qdiff.calibration.probed_sensitivity import probed_sensitivities
from qdiff.calibration.sensitivity import Operand, layer_sensitivity, sqnr
from qdiff.calibration.trajectory_sensitivity import trajectory_sensitivities
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.pipeline import Pipeline
from qdiff.sampling import DiffusionSchedule, Sampler, SamplerOptions, make_beta_schedule
from qdiff.wrapping import layer_places

W4A8 = QuantConfig(4, 8)
WEIGHTS, ACTS = Operand.WEIGHTS, Operand.ACTIVATIONS
SCHEDULE = DiffusionSchedule(make_beta_schedule("linear", 1e-4, 2e-2, 1000))
NAMES = ["conv_in", "up.0.block.0.nin_shortcut", "mid.block_1.conv2", "down.0.block.0.conv1"]
CLOSE = 0.03  # relative, of a finite difference in float32
SPREAD = 3.0  # dB, of 64 projections and images


class Small(nn.Module):
    """ε of an image [N, 2, 3, 3] and a class [N, 1, 4], with convolutions and a product."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.label = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 2, 1), nn.Linear(4, 6)

    def forward(self, x, t, context=None):
        y = self.one(x) + (t.view(-1, 1, 1, 1) / 1000).to(x.dtype)
        if context is not None:
            y = y * (1 + self.label(context)[:, 0, :, None, None])
        return self.two(torch.tanh(y))


class Stub(Pipeline):
    guided = False

    def conditions(self, rows, calibration):
        if not self.guided:
            return None, None
        classes = torch.stack([torch.randn(1, 4, generator=torch.Generator().manual_seed(i)) for i in rows])
        return classes, torch.zeros_like(classes)


def stub(network, shape=(2, 3, 3), guided=False, batch_size=4, **options):
    options = SamplerOptions(**{"steps": 5, "scale": 3.0 if guided else 1.0, **options})
    sampler = Sampler(SCHEDULE, shape, options, seed=7)
    made = Stub("stub", sampler, 1, batch_size)
    made.network, made.guided = network, guided
    return made


def sensitivities(pipeline, widths, names=None, images=range(4), seed=3, config=W4A8):
    names = list(layer_places(pipeline.network)) if names is None else names
    given = {operand: names if widths.get(operand) else [] for operand in Operand}
    generator = torch.Generator().manual_seed(seed)
    return trajectory_sensitivities(pipeline, given, {o: widths.get(o, ()) for o in Operand}, config, images, generator)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("options", [{}, {"kind": "plms"}, {"kind": "ddim", "eta": 1.0}])
def test_gradients_are_those_of_the_result(guided, options, heard_gradients):
    """What a weight's gradients say of a small change is what x_0 does."""
    torch.manual_seed(0)
    network = Small()
    changes = {n: 1e-3 * torch.randn_like(m.weight) for n, m in network.named_modules() if hasattr(m, "weight")}
    if not guided:
        del changes["label"]
    seen, drawn = heard_gradients
    pipeline = stub(network, guided=guided, **options)
    sensitivities(pipeline, {WEIGHTS: (4,)}, list(changes))

    @torch.no_grad()
    def result(factor):
        moved = copy.deepcopy(network)
        for name, change in changes.items():
            moved.get_submodule(name).weight += factor * change
        context = pipeline.conditions(range(4), True)
        return pipeline.sampler(moved, range(4), "cpu", *context, calibration=True)

    derivative = (result(1.0) - result(-1.0)) / 2
    expected = (drawn[0] * derivative).flatten(1).sum(1)
    told = sum((seen[network.get_submodule(n)] * c.flatten(1)).sum((1, 2)) for n, c in changes.items())
    largest = expected.abs().max()
    assert (told - expected).abs().max() < CLOSE * largest
    assert (1.1 * told - expected).abs().max() > CLOSE * largest


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_inputs_are_as_measured_layer_by_layer(guided, tiny_network, monkeypatch):
    """One layer at a time is quantized, and whole images are sampled."""
    torch.manual_seed(0)
    monkeypatch.setattr(trajectory_sensitivity, "LAST_CALL", 0.0)
    network, shape, names = (Small(), (2, 3, 3), ["one", "two"]) if guided else (tiny_network, (1, 8, 8), NAMES[:2])
    pipeline, images = stub(network, shape, guided, batch_size=8, steps=4), range(64)
    found = sensitivities(pipeline, {ACTS: (6, 8)}, names, images)[ACTS]

    @torch.no_grad()
    def result():
        context = pipeline.conditions(images, True) if guided else (None, None)
        return pipeline.sampler(network, images, "cpu", *context, calibration=True)

    wanted = result().double()

    def quality():
        return sqnr(float(wanted.square().sum()), float((result().double() - wanted).square().sum()))

    for name in names:
        expected = layer_sensitivity(network, name, W4A8, ACTS, (6, 8), quality)
        for bits, value in expected.items():
            assert abs(found[name][bits] - value) < SPREAD, (name, bits, found[name], expected)
        assert found[name][8] - found[name][6] > 2 * SPREAD  # a planted other width is seen


def test_the_last_call_has_a_share(monkeypatch):
    """Where it is all that counts, the noise is that of ε at the last call's inputs."""
    torch.manual_seed(0)
    network, images, last = Small(), range(64), []
    pipeline = stub(network, steps=4, batch_size=8)
    pipeline.sampler(network, images, calibration=True, on_call=lambda x, t, *_: last.append((x.clone(), t)))
    names = {WEIGHTS: [], ACTS: ["one", "two"]}
    expected = probed_sensitivities(
        network, names, {WEIGHTS: (), ACTS: (6,)}, W4A8, last[-1], 8, torch.Generator().manual_seed(1)
    )[ACTS]
    monkeypatch.setattr(trajectory_sensitivity, "LAST_CALL", 1e6)
    found = sensitivities(pipeline, {ACTS: (6,)}, names[ACTS], images)[ACTS]
    for name in names[ACTS]:
        assert abs(found[name][6] + 60 - expected[name][6]) < SPREAD
    monkeypatch.setattr(trajectory_sensitivity, "LAST_CALL", 0.0)
    without = sensitivities(pipeline, {ACTS: (6,)}, names[ACTS], images)[ACTS]
    assert any(abs(without[name][6] - expected[name][6]) > SPREAD for name in names[ACTS])


@pytest.mark.slow
def test_the_network_is_as_before(tiny_network, state_of):
    next(tiny_network.parameters()).requires_grad_(False)
    before = state_of(tiny_network)
    pipeline = stub(tiny_network, (1, 8, 8), steps=2)
    found = sensitivities(pipeline, {WEIGHTS: (2, 4), ACTS: (4, 8)}, images=range(2))
    after = state_of(tiny_network)
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())
    assert before[1:] == after[1:] and all(grad is None for _, grad in after[2])
    for operand, (narrow, wide) in ((WEIGHTS, (2, 4)), (ACTS, (4, 8))):
        assert all(found[operand][name][narrow] < found[operand][name][wide] for name in NAMES)
    again = sensitivities(pipeline, {WEIGHTS: (2, 4), ACTS: (4, 8)}, images=range(2))
    assert again == found


def test_a_layer_that_is_never_called():
    network = Small()
    found = sensitivities(stub(network, steps=2), {WEIGHTS: (4,), ACTS: (8,)}, images=range(2))
    assert found[WEIGHTS]["label"] is None and found[ACTS]["label"] is None
    assert found[WEIGHTS]["one"] is not None and found[ACTS]["two"] is not None


@pytest.mark.parametrize("calls", [50, 100])
def test_long_trajectories_are_shortened(calls, monkeypatch):
    made = []
    monkeypatch.setattr(trajectory_sensitivity, "_result", lambda pipeline, *_: made.append(pipeline) or 1 / 0)
    pipeline = stub(Small(), steps=calls, batch_size=2)
    with pytest.raises(ZeroDivisionError):
        sensitivities(pipeline, {ACTS: (8,)}, ["one"])
    assert made[0].calls == (25 if calls > 50 else calls) and made[0].network is pipeline.network
    assert pipeline.calls == calls


def test_a_loop_without_gradients():
    class Numbers(Stub):
        def sample_latents(self, network, rows):
            return super().sample_latents(network, rows).detach()

    pipeline = stub(Small(), steps=2)
    pipeline.__class__ = Numbers
    with pytest.raises(UserError, match="the sampler of stub lets no gradients through"):
        sensitivities(pipeline, {ACTS: (8,)}, ["one"])
    assert torch.is_grad_enabled()
