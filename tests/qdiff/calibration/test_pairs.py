"""A network over pairs of steps is the network on both, and where it modulates a trajectory of two steps."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from qdiff.calibration.objectives import lp_error, penalised_outside
from qdiff.calibration.pairs import PairedCall, PairedNetwork, of_second
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.walk import Walker, walk
from qdiff.config import QuantConfig
from qdiff.functional import fake_quantize
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

COUNT = 3
UNET = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "attention_resolutions": [2],
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": 8,
}
W4 = {"weight_bits": 4, "split_shortcut": True}
MODULATED = {
    "dynamic": {"act_bits": 4, "modulate": True, "act_dynamic": True},
    "rest": {"act_bits": 4, "modulate": True, "act_dynamic": True, "act_scale_per": "sample", "rest_bits": 6},
    "static": {"act_bits": 4, "modulate": True},
}


def unet():
    torch.manual_seed(0)
    network = UNetModel(**UNET).eval()
    for parameter in network.parameters():  # layers that start at zero would hide what comes before them
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


@pytest.fixture(params=["ddim", "ldm"])
def made(request):
    """``made(**config)``: a wrapped network with weights rounded and every range set, and pairs of its inputs."""

    def build(**config):
        network = request.getfixturevalue("tiny_network") if request.param == "ddim" else unet()
        qnn = QuantModel(network, QuantConfig(**W4, **config))
        for layer in qnn.layers().values():
            layer.init_weight_ranges(qnn.config.weight_range)
        for quantizer in qnn.calibrated_act_quantizers().values():
            quantizer.set(torch.tensor(0.03), torch.tensor(7))
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(COUNT, 1, 1 if request.param == "ddim" else 3, 8, 8, generator=generator)
        x = torch.cat([x, x + 0.2 * torch.randn(x.shape, generator=generator)], dim=1)
        t = torch.tensor([[900, 850], [500, 450], [100, 50]])
        context = torch.randn(COUNT, 1, 4, 8, generator=generator).repeat(1, 2, 1, 1)
        return qnn, (x, t) if request.param == "ddim" else (x, t, context)

    return build


def halves(pairs):
    return [tuple(i[:, step] for i in pairs) for step in (0, 1)]


def sequence(qnn, pairs):
    """The network on the first steps, then on the second ones: [N, 2, …]."""
    return torch.stack([qnn(*half) for half in halves(pairs)], dim=1)


@torch.no_grad()
def test_in_float_it_gives_the_outputs_of_both_steps(made):
    qnn, pairs = made()
    out = PairedNetwork(qnn.model)(*pairs)
    assert out.shape == pairs[0].shape and torch.equal(out, sequence(qnn, pairs))
    assert not torch.equal(out[:, 0], out[:, 1])
    with qnn.quantized():
        assert torch.equal(PairedNetwork(qnn.model)(*pairs), sequence(qnn, pairs))
        assert not torch.equal(sequence(qnn, pairs), out)


@pytest.mark.parametrize("kind", MODULATED)
@torch.no_grad()
def test_modulated_it_is_a_trajectory_of_two_steps(kind, made):
    qnn, pairs = made(**MODULATED[kind])
    with qnn.quantized():
        out = PairedNetwork(qnn.model)(*pairs)
        with qnn.trajectory():
            wanted = sequence(qnn, pairs)
        with qnn.trajectory():  # planted: the second step as a first one
            alone = qnn(*halves(pairs)[1])
    assert torch.equal(out, wanted)
    assert not torch.equal(out[:, 1], alone)
    assert all(layer.memory is None for layer in qnn.layers().values())


@torch.no_grad()
def activations(qnn, pairs):
    """{step: (inputs, output)}, each [N, 2, …], of the whole network on the first steps and then on the second."""
    seen = {}
    with contextlib.ExitStack() as stack:
        for step in list(qnn.model.steps()):
            hook = lambda _, args, out, name=step.name: seen.setdefault(name, []).append((*args, out))  # noqa: E731
            stack.callback(step.module.register_forward_hook(hook).remove)
        sequence(qnn, pairs)
    return {name: [torch.stack(both, dim=1) for both in zip(*calls, strict=True)] for name, calls in seen.items()}


@pytest.mark.parametrize("kind", MODULATED)
def test_walk_over_it_is_the_whole(kind, made):
    """Units hold what the whole network feeds them, and what it gives in float."""
    qnn, pairs = made(**MODULATED[kind])
    in_float = activations(qnn, pairs)
    with qnn.quantized(), qnn.trajectory():
        in_quantized = activations(qnn, pairs)
    walker, names, different = Walker(ActivationStorage(), torch.device("cpu")), [], 0
    for _, step, unit, _ in walk(PairedNetwork(qnn.model), pairs, walker, weights=True, activations=True):
        names.append(step.name)
        *float_inputs, target = in_float[step.name]
        assert torch.equal(unit.target, target)
        assert all(torch.equal(a, b) for a, b in zip(unit.float_inputs, float_inputs, strict=True))
        *quant_inputs, _ = in_quantized[step.name]
        assert all(torch.equal(a, b) for a, b in zip(unit.inputs, quant_inputs, strict=True))
        different += not torch.equal(unit.inputs[0], unit.float_inputs[0])
    assert names == [step.name for step in qnn.model.steps()] and different > len(names) // 2


def test_inputs_of_a_step_leave_the_state_as_it_is(made):
    """The walk asks for them in the float state and in the quantized one."""
    qnn, pairs = made()
    network = PairedNetwork(qnn.model)
    with torch.no_grad():
        state = network.start(*pairs)
        for step in network.steps():
            before = {key: list(v) if isinstance(v, list) else v for key, v in state.items()}
            step.inputs(state)
            assert set(state) == set(before)
            for key, value in before.items():
                kept = value if isinstance(value, list) else [value]
                now = state[key] if isinstance(value, list) else [state[key]]
                assert len(kept) == len(now) and all(a is b for a, b in zip(kept, now, strict=True))
            step(state)


# --- Gradients


def paired_layer():
    torch.manual_seed(0)
    layer = QuantModule(nn.Linear(6, 4), QuantConfig(weight_bits=None, act_bits=3, modulate=True))
    layer.requires_grad_(False)
    layer.act_quantizers[0].set(torch.tensor(0.07), torch.tensor(3))
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(5, 6, generator=generator)
    return layer, torch.stack([before, before + 0.2 * torch.randn(5, 6, generator=generator)], dim=1)


def test_step_sizes_learn_from_the_second_step_alone():
    layer, x = paired_layer()
    delta = layer.act_quantizers[0].delta.requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(5, 2, 4, generator=generator)
    with leaf_modes([layer], weights=False, activations=True):
        out = PairedCall(layer)(x)
        (first,) = torch.autograd.grad((out[:, 0] * weights[:, 0]).sum(), delta, retain_graph=True)
        (whole,) = torch.autograd.grad((out * weights).sum(), delta)
    # Written out: the output of the first step is given.
    given = (x[:, 0] @ layer.weight.T + layer.bias).detach()
    change = fake_quantize(x[:, 1] - x[:, 0], delta, torch.tensor(3), 3)
    wanted = given + change @ layer.weight.T
    assert torch.equal(out[:, 0], given) and torch.allclose(out[:, 1], wanted)
    (expected,) = torch.autograd.grad((wanted * weights[:, 1]).sum(), delta)
    assert first == 0 and expected != 0 and torch.allclose(whole, expected)
    x.requires_grad_(True)
    with leaf_modes([layer], weights=False, activations=True):
        (reached,) = torch.autograd.grad((PairedCall(layer)(x) * weights).sum(), x)
    assert not reached[:, 0].any() and reached[:, 1].any()


def test_memories_are_given_up_also_on_an_error():
    layer, x = paired_layer()
    with leaf_modes([layer], weights=False, activations=True), pytest.raises(RuntimeError):
        PairedCall(layer)(x[:, :, :5])
    assert layer.memory is None
    with torch.no_grad(), leaf_modes([layer], weights=False, activations=True):
        assert PairedCall(layer)(x).shape == (5, 2, 4)


# --- Objectives


def test_of_second_looks_at_the_second_step_alone():
    output = torch.tensor([[[9.0, 9.0], [1.0, 2.0]], [[9.0, 9.0], [3.0, 5.0]]])  # [2 samples, 2 steps, 2 channels]
    target = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, 3.0]]])
    rows = torch.arange(2)
    assert float(of_second(lp_error(2.0))(output, target, rows)) == pytest.approx((1 + 4 + 0 + 4) / 2)
    seen = []
    of_second(lambda *given: seen.append(given) or torch.zeros(()))(output, target, rows)
    assert torch.equal(seen[0][0], output[:, 1]) and torch.equal(seen[0][1], target[:, 1]) and seen[0][2] is rows


def test_penalty_outside_by_hand():
    output = torch.tensor([[0.0, 1.0], [2.0, -1.0]], requires_grad=True)  # from −1 to 2
    target = torch.tensor([[0.5, 3.0], [2.0, -1.5]])  # 3 and −1.5 lie outside
    rows, base = torch.arange(2), lp_error(2.0)
    error = (0.25 + 4 + 0 + 0.25) / 2
    assert base(output, target, rows).item() == pytest.approx(error)
    assert penalised_outside(base, 0.5)(output, target, rows).item() == pytest.approx(error + 0.5 * (2 + 0.5))
    assert penalised_outside(base, 0.0) is base
    (pull,) = torch.autograd.grad(penalised_outside(lambda o, t, r: 0 * o.sum(), 0.5)(output, target, rows), output)
    assert pull.tolist() == [[0.0, -0.5], [0.0, 0.5]]  # towards the targets outside, and nowhere else
    edge = torch.tensor([[-1.0, 2.0], [2.0, -1.0]])  # on the edge is inside
    assert penalised_outside(lambda *_: torch.zeros(()), 0.5)(output, edge, rows).item() == 0
