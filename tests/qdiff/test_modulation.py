"""Dynamic ranges and modulated layers (MoDiff): one layer, and what a trajectory remembers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from qdiff.config import QuantConfig, ScalePer
from qdiff.errors import UserError
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import DynamicActQuantizer

# --- one layer


def layer(scale_per="tensor", bits=3, split=False, kind=nn.Conv2d, **changes):
    torch.manual_seed(0)
    made = nn.Conv2d(6, 4, 3, padding=1) if kind is nn.Conv2d else nn.Linear(6, 4)
    if split:
        made.split_at = 2
    config = QuantConfig(
        weight_bits=None,
        act_bits=bits,
        act_dynamic=True,
        act_scale_per=scale_per,
        modulate=True,
        split_shortcut=split,
        **changes,
    )
    return QuantModel(nn.Sequential(made), config)


def steps(count=6, n=3, shape=(6, 5, 5)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator)
    return [x := x + 0.1 * torch.randn(x.shape, generator=generator) for _ in range(count)]


@torch.no_grad()
def run(qnn, xs):
    with qnn.quantized(), qnn.trajectory():
        return [qnn(x) for x in xs]


@pytest.mark.parametrize("scale_per", list(ScalePer))
@pytest.mark.parametrize("split", [False, True])
def test_equations(scale_per, split):
    """â and o by the paper's equations, in float64 but for the quantizer."""
    qnn, xs = layer(scale_per, split=split), steps()
    module: QuantModule = qnn.model[0]
    weight, bias = module.weight.double(), module.bias.double()
    convolve = lambda x, b: nn.functional.conv2d(x, weight, b, padding=1)  # noqa: E731
    state, wanted = xs[0].double(), [convolve(xs[0].double(), bias)]
    for x in xs[1:]:
        parts = (x.double() - state).float().split(module.slices, dim=1)
        delta = torch.cat([q(part) for q, part in zip(module.act_quantizers, parts, strict=True)], dim=1).double()
        state = state + delta
        wanted.append(wanted[-1] + convolve(delta, None))
    for ours, theirs in zip(run(qnn, xs), wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-4
    # Planted: quantizing the input itself is far away.
    with torch.no_grad(), qnn.quantized():
        plain = module.apply_weight(module._quantized(xs[-1], module.act_quantizers), module.weight, module.bias)
    assert (plain - wanted[-1]).abs().max() > 1e-2


def test_errors_do_not_add_up():
    """After many steps the error is that of one step: what one loses is in the next difference."""
    xs = steps(60)
    qnn = layer(bits=3)
    with torch.no_grad():
        errors = [(ours - qnn.model(x)).abs().mean() for ours, x in zip(run(qnn, xs), xs, strict=True)]
    early, late = sum(errors[2:8]) / 6, sum(errors[-6:]) / 6
    assert late < 2 * early and errors[0] == 0
    # Without compensation (the difference to the last input, not to the reconstruction) it does.
    module, lost = qnn.model[0], torch.zeros_like(xs[0])
    for before, x in itertools.pairwise(xs):
        lost += module.act_quantizers[0](x - before) - (x - before)
    assert lost.abs().mean() > 3 * (module.act_quantizers[0](xs[-1] - xs[-2]) - (xs[-1] - xs[-2])).abs().mean()


def test_every_quantizer_fires_on_every_later_step_and_sees_the_difference(monkeypatch):
    qnn, xs, seen = layer(split=True), steps(4), []
    forward = DynamicActQuantizer.forward
    monkeypatch.setattr(DynamicActQuantizer, "forward", lambda self, x: seen.append(x) or forward(self, x))
    run(qnn, xs)
    assert len(seen) == 2 * 3  # two slices, every step but the first
    first = torch.cat(seen[:2], dim=1)
    assert torch.equal(first, xs[1] - xs[0])
    assert max(part.abs().max() for part in seen) < 0.5 * xs[0].abs().max()


def test_bias_is_added_once():
    qnn = layer(bits=8)
    x = steps(1)[0]
    first, second, third = run(qnn, [x, x, x])
    assert torch.equal(first, second) and torch.equal(first, third)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.Linear])
@pytest.mark.parametrize("scale_per", list(ScalePer))
def test_ranges_are_shared_as_asked_for(kind, scale_per):
    quantizer = layer(scale_per, bits=4, kind=kind).model[0].act_quantizers[0]
    dims = (2, 6, 3, 3) if kind is nn.Conv2d else (2, 5, 6)
    channel = 1 if kind is nn.Conv2d else 2
    x = torch.randn(dims, generator=torch.Generator().manual_seed(2))
    alone = {
        ScalePer.TENSOR: lambda: quantizer(x),
        ScalePer.SAMPLE: lambda: torch.cat([quantizer(part) for part in x.split(1)]),
        ScalePer.CHANNEL: lambda: torch.cat([quantizer(part) for part in x.split(1, dim=channel)], dim=channel),
    }
    assert torch.equal(quantizer(x), alone[scale_per]())
    others = [made() for kind, made in alone.items() if kind is not scale_per and kind is not ScalePer.TENSOR]
    assert all(not torch.equal(quantizer(x), other) for other in others)


# --- the trajectory


@torch.no_grad()
def test_no_trajectory_is_an_error():
    qnn = layer()
    with qnn.quantized(), pytest.raises(RuntimeError, match=r"qnn\.trajectory"):
        qnn(steps(1)[0])
    assert torch.isfinite(qnn(steps(1)[0])).all()  # in float it needs none


@torch.no_grad()
def test_a_batch_of_another_shape_is_an_error():
    qnn = layer()
    with qnn.quantized(), qnn.trajectory():
        qnn(steps(1, n=1)[0])
        with pytest.raises(RuntimeError, match=r"0 met a batch of shape \[3, 6, 5, 5\] in a trajectory of \[1, 6"):
            qnn(steps(1, n=3)[0])


@torch.no_grad()
def test_trajectories_do_not_meet():
    qnn, xs = layer(), steps(3)
    first = run(qnn, xs)
    run(qnn, steps(2, n=1))
    with pytest.raises(ZeroDivisionError), qnn.quantized(), qnn.trajectory():
        qnn(xs[0])
        raise ZeroDivisionError
    assert qnn.model[0].memory is None
    assert all(torch.equal(a, b) for a, b in zip(first, run(qnn, xs), strict=True))
    with qnn.trajectory(), pytest.raises(RuntimeError, match="open already"), qnn.trajectory():
        pass


def test_gradients_are_refused():
    qnn = layer()
    x = steps(1)[0].requires_grad_(True)
    with qnn.quantized(), qnn.trajectory(), pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        qnn(x)


def test_without_modulation_a_trajectory_does_nothing():
    qnn = QuantModel(nn.Sequential(nn.Linear(4, 4)), QuantConfig(weight_bits=None, act_bits=4, act_dynamic=True))
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), qnn.quantized():
        alone = qnn(x)
        with qnn.trajectory():
            assert torch.equal(qnn(x), alone) and torch.equal(qnn(x[:1])[0], qnn(x[:1])[0])


def test_bad_configs_name_the_option():
    with pytest.raises(UserError, match="--quant_act"):
        QuantConfig(modulate=True)
    with pytest.raises(UserError, match="tensor, sample, channel"):
        QuantConfig(act_scale_per="batch")
