"""What modulation leaves in float and may quantize after all, and what it loses without one of its parts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from qdiff.config import QuantConfig
from qdiff.functional import fake_quantize_inference
from qdiff.interface import AttentionCore
from qdiff.quant_model import QuantModel
from qdiff.quantizer import DynamicActQuantizer
from qdiff.ranges.qparams import qparams

ATTENTION = ("act_quantizer_q", "act_quantizer_k", "act_quantizer_v", "act_quantizer_w")
# Absolute, of outputs around 1: the same sums in float64.
SUM_TOLERANCE = 1e-5


class Attended(nn.Module):
    """A layer, attention over its output, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.core, self.leave = nn.Linear(8, 8), AttentionCore(), nn.Linear(8, 4)

    def forward(self, x):
        h = self.enter(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return self.leave(self.core(h, 2 * h, h.flip(-1)).transpose(1, 2).flatten(2))


def wrapped(**changes) -> QuantModel:
    torch.manual_seed(0)
    config = {"weight_bits": None, "act_bits": 3, "act_dynamic": True, "modulate": True, **changes}
    return QuantModel(Attended(), QuantConfig(**config))


def steps(count=6, step=0.1, x=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 8, generator=generator)
    return [x := x + step * torch.randn(x.shape, generator=generator) for _ in range(count)]


@torch.no_grad()
def run(qnn, xs):
    with qnn.quantized(), qnn.trajectory():
        return [qnn(x) for x in xs]


@pytest.fixture
def fired(monkeypatch):
    """``fired(qnn, xs)``: for every step, {quantizer: what it saw} of a trajectory."""
    seen, forward = {}, DynamicActQuantizer.forward
    monkeypatch.setattr(
        DynamicActQuantizer, "forward", lambda self, x: seen.setdefault(self, []).append(x) or forward(self, x)
    )

    @torch.no_grad()
    def trajectory(qnn, xs):
        names, made = {m: n for n, m in qnn.model.named_modules()}, []
        with qnn.quantized(), qnn.trajectory():
            for x in xs:
                seen.clear()
                qnn(x)
                made.append({names[quantizer]: inputs for quantizer, inputs in seen.items()})
        return made

    return trajectory


def quantized_as_a_whole(x, bits):
    delta, zero_point = qparams(*(extreme.double() for extreme in torch.aminmax(x)), bits, symmetric=False)
    return fake_quantize_inference(x, delta.to(x.dtype), zero_point, bits)


# --- --rest_abit


@pytest.mark.parametrize("bits", [2, 8])
def test_the_first_step_is_quantized_once_a_trajectory(bits, fired):
    qnn, xs = wrapped(rest_bits=bits), steps(4)
    for _ in range(2):  # also in the second trajectory
        first, *later = fired(qnn, xs)
        assert {n for n in first if "first" in n} == {"enter.first_quantizers.0", "leave.first_quantizers.0"}
        assert torch.equal(first["enter.first_quantizers.0"][0], xs[0])
        assert all(len(seen) == 1 for seen in first.values())
        assert not any(name.startswith(("enter.act", "leave.act")) for name in first)
        for made in later:
            assert not any("first" in name for name in made)
            assert len(made["enter.act_quantizers.0"]) == len(made["leave.act_quantizers.0"]) == 1
    # The state begins at what was quantized, so the first change makes up for what that lost.
    started = quantized_as_a_whole(xs[0], bits)
    assert torch.equal(later[0]["enter.act_quantizers.0"][0], xs[1] - started)
    assert not torch.equal(started, xs[0])


def test_the_first_step_is_in_float_without():
    xs = steps(1)
    qnn = wrapped()
    with torch.no_grad():
        exact = qnn(xs[0])
    # Attention takes its two explicit products, which sum in another order than the fused kernel.
    assert (run(qnn, xs)[0] - exact).abs().max() < SUM_TOLERANCE
    assert (run(wrapped(rest_bits=8), xs)[0] - exact).abs().max() > SUM_TOLERANCE


def test_split_layers_quantize_each_part_of_the_first_step(fired):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 4, 1)
    layer.split_at = 2
    config = {"act_bits": 3, "act_dynamic": True, "modulate": True, "rest_bits": 4, "split_shortcut": True}
    qnn = QuantModel(nn.Sequential(layer), QuantConfig(weight_bits=None, **config))
    x = torch.randn(2, 6, 3, 3, generator=torch.Generator().manual_seed(2)) + torch.arange(6.0)[:, None, None]
    first, later = fired(qnn, [x, x])
    assert [tuple(seen[0].shape) for seen in first.values()] == [(2, 2, 3, 3), (2, 4, 3, 3)]
    started = torch.cat([quantized_as_a_whole(part, 4) for part in x.split([2, 4], dim=1)], dim=1)
    assert torch.equal(torch.cat([seen[0] for seen in later.values()], dim=1), x - started)


@pytest.mark.parametrize("modulate", [False, True])
def test_attention_s_operands_have_that_width_at_every_step(modulate, fired):
    xs = steps(3)
    qnn = wrapped(rest_bits=6, modulate=modulate)
    assert {getattr(qnn.model.core, name).bits for name in ATTENTION} == {6}
    for made in fired(qnn, xs):
        assert {name for name in made if name.startswith("core.")} == {f"core.{name}" for name in ATTENTION}
        assert all(len(made[f"core.{name}"]) == 1 for name in ATTENTION)
        assert float(made["core.act_quantizer_w"][0].sum(-1).mean()) == pytest.approx(1)  # all of it, no change of it
    plain = wrapped(modulate=modulate)
    assert not any(hasattr(plain.model.core, name) for name in ATTENTION)
    assert not any(name.startswith("core.") for made in fired(plain, xs) for name in made)


def test_attention_takes_the_ranges_at_hand_also_where_changes_are_calibrated(fired):
    qnn, xs = wrapped(rest_bits=6, act_dynamic=False), steps(2)
    assert set(qnn.calibrated_act_quantizers()) == {"enter.act_quantizers.0", "leave.act_quantizers.0"}
    for quantizer in qnn.calibrated_act_quantizers().values():
        quantizer.set(torch.tensor(0.1), torch.tensor(4))
    for names in fired(qnn, xs):
        assert {name for name in names if name.startswith("core.")} == {f"core.{name}" for name in ATTENTION}


def test_attention_is_as_its_operands_say(fired):
    """q·k and softmax·v with each operand quantized by its own extremes."""
    qnn, xs = wrapped(rest_bits=4), steps(2)
    captured = []
    qnn.model.core.register_forward_hook(lambda _, args, out: captured.append((args, out)))
    run(qnn, xs)
    for (q, k, v), out in captured:
        q, k, v = (quantized_as_a_whole(operand, 4) for operand in (q, k, v))
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        high = weights.max() / 15
        weights = (weights / high).round() * high
        assert (weights @ v - out).abs().max() < SUM_TOLERANCE
        assert (weights @ captured[0][0][2] - out).abs().max() > SUM_TOLERANCE  # planted: v in float


# --- Without compensation


def layer(**changes):
    torch.manual_seed(0)
    config = {"weight_bits": None, "act_bits": 3, "act_dynamic": True, "modulate": True, **changes}
    return QuantModel(nn.Sequential(nn.Linear(8, 4)), QuantConfig(**config))


def test_no_compensation_is_its_formula():
    """o ← o + W·Q(x_t − x_{t−1}): in float64 but for the quantizer."""
    xs = steps(8)
    qnn = layer(ablation="no-compensation")
    module = qnn.model[0]
    weight = module.weight.double()
    wanted = [xs[0].double() @ weight.T + module.bias.double()]
    for before, x in itertools.pairwise(xs):
        wanted.append(wanted[-1] + module.act_quantizers[0](x - before).double() @ weight.T)
    made = run(qnn, xs)
    assert all((ours - theirs).abs().max() < SUM_TOLERANCE for ours, theirs in zip(made, wanted, strict=True))
    compensated = run(layer(), xs)
    assert torch.equal(compensated[1], made[1])  # there is nothing to make up for yet
    assert all((a - b).abs().max() > SUM_TOLERANCE for a, b in zip(compensated[2:], made[2:], strict=True))


def test_errors_add_up_without_compensation():
    xs = steps(60)
    with torch.no_grad():
        exact = [layer().model(x) for x in xs]

    def late(**changes):
        made = run(layer(**changes), xs)
        return float(sum((a - b).square().mean() for a, b in zip(made[-6:], exact[-6:], strict=True)))

    assert late(ablation="no-compensation") > 10 * late()  # of squares; 66 was seen


# --- With the state cleared before every step


@pytest.mark.parametrize("rest_bits", [None, 8])
def test_cleared_state_makes_every_step_a_first_one(rest_bits, fired):
    xs = steps(4)
    qnn = wrapped(ablation="cleared-state", rest_bits=rest_bits)
    made = run(qnn, xs)
    whole = wrapped(rest_bits=rest_bits)
    assert all(torch.equal(ours, run(whole, [x])[0]) for ours, x in zip(made, xs, strict=True))
    assert not torch.equal(made[1], run(whole, xs)[1])
    for names in fired(qnn, xs):
        assert not any(name.startswith(("enter.act", "leave.act")) for name in names)
        assert bool(names) == (rest_bits is not None)
    assert all(module.memory is None for module in qnn.layers().values())


def test_cleared_state_is_outside_a_trajectory_what_it_was():
    qnn = wrapped(ablation="cleared-state")
    with torch.no_grad():
        assert torch.equal(qnn(steps(1)[0]), wrapped()(steps(1)[0]))
        with qnn.quantized(), pytest.raises(RuntimeError, match="trajectory"):
            qnn(steps(1)[0])
