"""The wrapped network: modes, state, errors, cost."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdiff import quantizer, weight_forms
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.modes import leaves
from qdiff.quant_model import QuantModel
from qdiff.weight_forms import WeightForm

W4A8 = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split_shortcut": True}

# Relative L2: a 4-bit network differs from float by 3e-2 and more, float rounding by less than 1e-6.
SAME_NETWORK_TOLERANCE = 1e-6


@pytest.fixture
def tiny_config(tiny_config):
    """Two channels a norm group: with one, the norm takes out what the time embedding adds."""
    tiny_config.model.ch = 64
    return tiny_config


def modes(qnn):
    return [(leaf.acts_quantized, getattr(leaf, "weights_quantized", None)) for leaf in leaves(qnn)]


def holds_dequantized(qnn):
    return [layer.form is WeightForm.DEQUANTIZED for layer in qnn.layers().values()]


@torch.no_grad()
def test_wrapping_leaves_the_float_output_and_the_parameters(tiny_network, held_out):
    expected = tiny_network(*held_out)
    before = {n: p.data_ptr() for n, p in tiny_network.named_parameters()}
    qnn = QuantModel(tiny_network, QuantConfig(**W4A8))
    assert torch.equal(qnn(*held_out), expected)
    assert torch.equal(qnn(*held_out, None), expected), "an absent condition is not passed on"
    after = {n: p.data_ptr() for n, p in qnn.model.named_parameters()}
    assert before.items() <= after.items(), "parameters were copied or renamed"


def test_every_leaf_is_replaced(tiny_network, wrap):
    float_leaves = len([m for m in tiny_network.modules() if isinstance(m, nn.Conv2d | nn.Linear)])
    qnn = wrap(**W4A8)
    assert not [m for m in qnn.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(qnn.layers()) == float_leaves > 40
    split = [n for n, layer in qnn.layers().items() if len(layer.slices) == 2]
    assert split and all(n.startswith("up.") and n.endswith("nin_shortcut") for n in split)


def test_dropout_is_off_and_parameters_are_frozen(tiny_network, held_out):
    tiny_network.train()
    qnn = QuantModel(tiny_network, QuantConfig())
    assert not any(m.training for m in qnn.modules())
    assert not any(p.requires_grad for p in qnn.parameters())
    assert torch.equal(qnn(*held_out), qnn(*held_out))


def test_a_network_without_layers_is_refused():
    with pytest.raises(UserError, match="no layer"):
        QuantModel(nn.Sequential(nn.ReLU()), QuantConfig())


def test_modes_nest_and_are_restored(calibrated):
    qnn = calibrated(**W4A8)
    before = modes(qnn)
    assert not any(a or w for a, w in before)
    with qnn.quantized(weights=True, activations=False) as same:
        assert same is qnn
        outer = modes(qnn)
        assert all(not a for a, _ in outer) and any(w for _, w in outer)
        with qnn.quantized(weights=False, activations=True):
            assert all(a and not w for a, w in modes(qnn))
        assert modes(qnn) == outer
        assert all(holds_dequantized(qnn))
    assert modes(qnn) == before
    assert not any(holds_dequantized(qnn)), "dequantized weights take memory after the block"


def test_modes_are_restored_after_an_exception(calibrated, held_out):
    qnn = calibrated(**W4A8)
    before, expected = modes(qnn), qnn(*held_out)
    with pytest.raises(ZeroDivisionError), qnn.quantized():
        raise ZeroDivisionError
    assert modes(qnn) == before
    assert torch.equal(qnn(*held_out), expected)


def test_modes_are_restored_when_entering_fails(calibrated, monkeypatch):
    qnn = calibrated(**W4A8)
    last = list(qnn.layers().values())[-1]
    monkeypatch.setattr(last, "hold_dequantized", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), qnn.quantized():
        pass
    assert not any(a or w for a, w in modes(qnn))


def test_each_side_alone_and_both_differ(calibrated, held_out, run_quantized, relative):
    qnn = calibrated(**W4A8)
    outputs = [run_quantized(qnn, held_out, w, a) for w in (False, True) for a in (False, True)]
    assert relative(outputs[0], qnn(*held_out)) < SAME_NETWORK_TOLERANCE
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert relative(one, other) > SAME_NETWORK_TOLERANCE


@pytest.mark.slow
def test_a_side_without_width_stays_in_float(calibrated, held_out, run_quantized):
    qnn = calibrated(weight_bits=4, act_bits=None)
    assert not qnn.act_quantizers()
    assert torch.equal(run_quantized(qnn, held_out), run_quantized(qnn, held_out, activations=False))
    qnn = calibrated(weight_bits=None, act_bits=8)
    assert torch.equal(run_quantized(qnn, held_out), run_quantized(qnn, held_out, weights=False))
    assert not torch.equal(run_quantized(qnn, held_out), qnn(*held_out))


@pytest.mark.parametrize(("weights", "activations", "kind"), [(True, False, "weight"), (False, True, "activation")])
def test_an_unset_quantizer_is_an_error_that_names_it(wrap, weights, activations, kind):
    qnn = wrap(**W4A8)
    with pytest.raises(UserError, match=rf"{kind} quantizer temb\.dense\.0"), qnn.quantized(weights, activations):
        pytest.fail("an uncalibrated network was run")
    with qnn.quantized(weights=False, activations=False):
        pass


def test_one_unset_quantizer_among_many_is_found(calibrated):
    qnn = calibrated(**W4A8)
    qnn.model.mid.attn_1.core.act_quantizer_w.initialised.fill_(False)
    with pytest.raises(UserError, match=r"mid\.attn_1\.core\.act_quantizer_w"), qnn.quantized():
        pass
    with qnn.quantized(activations=False):
        pass


def test_silent_quantizers_are_those_that_did_not_fire(calibrated, held_out, run_quantized):
    qnn = calibrated(**W4A8)
    qnn.reset_fired()
    assert sorted(qnn.silent_quantizers()) == sorted(qnn.act_quantizers())
    qnn(*held_out)
    run_quantized(qnn, held_out, activations=False)
    assert sorted(qnn.silent_quantizers()) == sorted(qnn.act_quantizers())
    run_quantized(qnn, held_out)
    assert qnn.silent_quantizers() == []
    assert {q.fired for q in qnn.act_quantizers().values()} == {1}

    qnn.reset_fired()
    qnn.model.mid.attn_1.core.forward = lambda q, k, v: v
    run_quantized(qnn, held_out)
    assert qnn.silent_quantizers() == [f"mid.attn_1.core.act_quantizer_{o}" for o in "qkvw"]


@pytest.mark.slow
@pytest.mark.parametrize("config", [W4A8, {"weight_bits": 3}, {"weight_bits": None, "act_bits": 6}])
def test_state_dict_is_the_truth(wrap, calibrated, held_out, run_quantized, config):
    """Strict, into a network that never ran a forward pass."""
    source, target = calibrated(**config), wrap(**config)
    with torch.no_grad():  # other float weights: everything must come from the state
        for parameter in target.parameters():
            parameter.fill_(0.5)
    target.load_state_dict(copy.deepcopy(source.state_dict()), strict=True)
    assert torch.equal(run_quantized(target, held_out), run_quantized(source, held_out))
    assert torch.equal(target(*held_out), source(*held_out))


def test_state_dict_of_another_layout_is_refused(wrap, calibrated):
    with pytest.raises(RuntimeError, match="nin_shortcut"):
        wrap(weight_bits=4).load_state_dict(calibrated(weight_bits=4, split_shortcut=True).state_dict())


def test_state_is_the_same_in_every_mode(calibrated):
    qnn = calibrated(**W4A8)
    names = set(qnn.state_dict())
    with qnn.quantized():
        assert set(qnn.state_dict()) == names, "dequantized weights must not enter checkpoints"


def test_loading_a_state_inside_a_mode_takes_effect(calibrated, held_out):
    qnn = calibrated(weight_bits=4)
    state = copy.deepcopy(qnn.state_dict())
    for name in state:
        if name.endswith("weight_int"):
            state[name].fill_(0)
    with qnn.quantized(), torch.no_grad():
        before = qnn(*held_out)
        qnn.load_state_dict(state)
        assert not torch.equal(qnn(*held_out), before)


@pytest.mark.slow
def test_weight_only_sampling_costs_what_float_costs(calibrated, held_out, monkeypatch):
    """Inside the mode a forward runs the same operations as the float network, with nothing dequantized."""
    qnn = calibrated(**W4A8)
    work = []
    for module, name in (
        (weight_forms, "dequantize"),
        (weight_forms, "quantize"),
        (quantizer, "fake_quantize_inference"),
    ):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name: work.append(n) or f(*a))

    def operations():
        with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            qnn(*held_out)
        return {event.key: event.count for event in profile.key_averages()}

    in_float = operations()
    with qnn.quantized(weights=True, activations=False):
        assert len(work) > 0, "the patch sees no work: the test is blind"
        work.clear()
        assert operations() == in_float
        assert work == []
    with qnn.quantized():
        assert operations() != in_float


def test_weight_only_output_is_the_float_network_with_dequantized_weights(
    calibrated, tiny_network, held_out, run_quantized, relative
):
    qnn = calibrated(weight_bits=4, split_shortcut=True)
    out = run_quantized(qnn, held_out)
    for name, layer in qnn.layers().items():
        integers = layer.weight_int.float().split(layer.slices, dim=1)
        parts = [(q - wq.zero_point) * wq.delta for q, wq in zip(integers, layer.weight_quantizers, strict=True)]
        tiny_network.get_submodule(name).weight.data.copy_(torch.cat(parts, dim=1))
    with torch.no_grad():
        assert relative(out, tiny_network(*held_out)) < SAME_NETWORK_TOLERANCE
        tiny_network.mid.attn_1.q.weight.data.mul_(1.01)
        assert relative(out, tiny_network(*held_out)) > SAME_NETWORK_TOLERANCE


def test_float_attention_stays_on_the_fused_kernel_under_weight_quantization(calibrated, held_out, monkeypatch):
    qnn, calls = calibrated(**W4A8), []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    with qnn.quantized(activations=False):
        qnn(*held_out)
    assert len(calls) == sum(n.endswith("act_quantizer_w") for n in qnn.act_quantizers()) > 0


def test_there_is_no_training_mode(tiny_network):
    qnn = QuantModel(tiny_network, QuantConfig(weight_bits=8))
    assert any(isinstance(m, torch.nn.Dropout) for m in qnn.modules())
    qnn.train()
    assert not any(m.training for m in qnn.modules())


def test_a_quantized_network_is_not_wrapped_again(tiny_network):
    QuantModel(tiny_network, QuantConfig(weight_bits=8))
    with pytest.raises(UserError, match="already quantized"):
        QuantModel(tiny_network, QuantConfig(weight_bits=4))
