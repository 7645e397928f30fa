"""Attention inside any module: routed to cores that can be quantized, and an error where it goes elsewhere."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from traced_networks import WIDTH, Attention, SkipNetwork, inputs, made

from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.interface import AttentionCore
from qdiff.modes import leaf_modes
from qdiff.quant_attention import QuantAttention
from qdiff.quant_model import QuantModel
from qdiff.tracing.attention_calls import core_name, route_attention, routed_calls
from qdiff.tracing.trace import count_calls

# Relative L2 in float64: two explicit products against the fused kernel.
TOLERANCE = 1e-9


class Calls(nn.Module):
    """Attention with every argument that it may have."""

    def __init__(self, arguments):
        super().__init__()
        self.arguments = arguments

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **self.arguments)


def qkv(heads=2, key_heads=2, count=3):
    generator = torch.Generator().manual_seed(0)
    shapes = (count, heads, 5, WIDTH), (count, key_heads, 7, WIDTH), (count, key_heads, 7, WIDTH)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def seen(count, start):
    """A mask [count, 1, 5, 7] with which each sample sees other keys."""
    return (
        torch.arange(7)[None, None, None]
        < (torch.arange(count)[:, None, None, None] + start) + torch.arange(5)[:, None]
    )


ARGUMENTS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "one mask": {"attn_mask": torch.arange(7)[None] < 4},
    "mask per query": {"attn_mask": seen(1, 2)[0, 0]},
    "mask per sample": {"attn_mask": seen(3, 1)},
    "added": {"attn_mask": torch.where(seen(3, 1), 0.0, -2.0).double()},
    "masked away": {"attn_mask": seen(3, 0)},  # the first query of the first sample sees no key
    "causal": {"is_causal": True},
    "no dropout": {"dropout_p": 0.0},
    "shared keys": {"enable_gqa": True},
}


def with_fine_steps(core):
    """Set steps so small that rounding does not show, over a range that holds every value."""
    for operand in "qkvw":
        quantizer = getattr(core, f"act_quantizer_{operand}").double()
        quantizer.bits, quantizer.zero_point = 40, torch.tensor(0 if operand == "w" else 2**39)
        nn.init.constant_(quantizer.delta, 1e-11)
    return core


@pytest.mark.parametrize("name", ARGUMENTS)
@torch.no_grad()
def test_a_core_computes_what_the_call_would(name, relative):
    network, given = Calls(ARGUMENTS[name]), qkv(4 if name == "shared keys" else 2)
    expected = network(*given)
    route_attention(network, {"": 1})
    assert torch.equal(network(*given), expected)
    network.attention_core_0 = with_fine_steps(QuantAttention(network.attention_core_0, QuantConfig(4, 8)))
    with leaf_modes([network], weights=True, activations=True):
        quantized = network(*given)
    assert relative(quantized, expected) < TOLERANCE < relative(quantized * (1 + 1e-8), expected)
    assert not torch.equal(quantized, expected), "it was not routed"


def test_a_mask_comes_to_the_core_with_a_row_per_sample():
    network, found = Calls({"attn_mask": torch.ones(5, 7, dtype=torch.bool)}), []
    route_attention(network, {"": 1})
    network.attention_core_0.register_forward_hook(lambda _, args, __: found.extend(args))
    network(*qkv())
    assert [len(part) for part in found] == [3, 3, 3, 3]


class TwoCalls(Attention):
    """Two calls in one forward, the second through a module inside that makes its own."""

    def __init__(self):
        super().__init__()
        self.inner = Attention()

    def forward(self, h):
        return self.inner(super().forward(h)) + super().forward(h)


def test_each_call_has_its_core():
    network = made(TwoCalls)
    (x, _), order = inputs(2), []
    calls = count_calls(network, (x,)).attention
    assert calls == {"": 2, "inner": 1}
    route_attention(network, calls)
    route_attention(network, calls)  # once is enough
    assert routed_calls(network) == calls
    for name, core in network.named_modules():
        if isinstance(core, AttentionCore):
            core.register_forward_hook(lambda *_, name=name: order.append(name))
    network(x)
    assert order == [core_name(0), f"inner.{core_name(0)}", core_name(1)]
    assert len(network._forward_pre_hooks) == len(network._forward_hooks) == 1


class Replaced(SkipNetwork):
    """Its attention can be computed otherwise later, as by another processor."""

    calls = 1

    class attention(Attention):
        def attend(self, q, k, v):
            if Replaced.calls == 0:
                return (q @ k.transpose(-2, -1)).softmax(-1) @ v
            for _ in range(Replaced.calls):
                out = F.scaled_dot_product_attention(q, k, v)
            return out


@pytest.mark.parametrize(("calls", "message"), [(0, "only 0 of the"), (2, "more than the 1 attention calls")])
def test_attention_that_goes_elsewhere_is_an_error(calls, message, monkeypatch):
    network = made(Replaced)
    qnn = QuantModel(network, QuantConfig(4, 8), inputs(2))
    qnn(*inputs(2))
    monkeypatch.setattr(Replaced, "calls", calls)
    with pytest.raises(UserError, match=f"a module of type attention now makes {message}"):
        qnn(*inputs(2))
    monkeypatch.undo()
    qnn(*inputs(2))  # nothing is left behind


def test_a_name_in_torch_that_is_replaced_is_an_error(monkeypatch):
    network = made(SkipNetwork)
    qnn = QuantModel(network, QuantConfig(4, 8), inputs(2))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: v)
    with pytest.raises(UserError, match="only 0 of the attention calls that were quantized"):
        qnn(*inputs(2))


def test_the_first_error_is_the_one_that_shows(recwarn):
    network = made(SkipNetwork)
    qnn = QuantModel(network, QuantConfig(4, 8), inputs(2))
    network.middle.qkv.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        qnn(*inputs(2))
    assert not recwarn.list


def test_threads_do_not_see_each_others_calls():
    """While one is inside a core, the other's attention is still routed."""
    network = made(SkipNetwork)
    qnn, inside, others, failed = QuantModel(network, QuantConfig(4, 8), inputs(2)), threading.Event(), [], []
    core = network.middle.attention_core_0

    def stop(*_):
        if threading.current_thread() is first:
            inside.set()
            done.wait(10)
        else:
            others.append("routed")

    core.register_forward_pre_hook(stop)
    done, first = threading.Event(), threading.Thread(target=lambda: qnn(*inputs(2)))
    first.start()
    inside.wait(10)
    try:
        qnn(*inputs(2))
    except Exception as error:
        failed.append(error)
    finally:
        done.set()
        first.join()
    assert (failed, others) == ([], ["routed"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda qnn: pickle.loads(pickle.dumps(qnn))])
def test_copies_route_to_their_own_cores(copied):
    network = made(SkipNetwork)
    qnn, order = QuantModel(network, QuantConfig(4, 8), inputs(2)), []
    twin = copied(qnn)
    qnn.model.middle.attention_core_0.register_forward_hook(lambda *_: order.append("first"))
    twin.model.middle.attention_core_0.register_forward_hook(lambda *_: order.append("twin"))
    twin(*inputs(2))
    assert order == ["twin"]


def test_without_quantized_activations_attention_stays_as_it_is():
    network = made(SkipNetwork)
    QuantModel(network, QuantConfig(4), inputs(2))
    assert routed_calls(network) == {} and not network.middle._forward_hooks
