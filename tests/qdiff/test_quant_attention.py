"""The quantized attention core: the fused path when float, four quantizers when not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qdiff.config import QuantConfig
from qdiff.functional import fake_quantize_inference
from qdiff.interface import AttentionCore
from qdiff.modes import leaf_modes
from qdiff.quant_attention import QuantAttention

# Relative L2 in float64: the same quantized operands, the logits scaled before or after the matmul.
OUTPUT_TOLERANCE = 1e-9

DELTAS = {"q": 0.05, "k": 0.06, "v": 0.04, "w": 1 / 255}


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64) for length in (5, 7, 7))


def core_with_ranges(prescale=False, softmax_bits=8):
    core = QuantAttention(AttentionCore(prescale), QuantConfig(4, 8, act_symmetric=True, softmax_bits=softmax_bits))
    for name, delta in DELTAS.items():
        getattr(core, f"act_quantizer_{name}").set(torch.tensor(delta), torch.tensor(0 if name == "w" else 128))
    return core


def quantized(core, q, k, v):
    with leaf_modes([core], weights=False, activations=True), torch.no_grad():
        return core(q, k, v)


def reference(q, k, v, prescale, deltas=DELTAS):
    """softmax(q·kᵀ/√d)·v with each operand quantized, written out."""

    def fq(x, name):
        return fake_quantize_inference(x, torch.tensor(deltas[name]), torch.tensor(0 if name == "w" else 128), 8)

    root = 8**0.25  # √√d
    if prescale:
        logits = torch.einsum("nhld,nhsd->nhls", fq(q / root, "q"), fq(k / root, "k"))
    else:
        logits = torch.einsum("nhld,nhsd->nhls", fq(q, "q"), fq(k, "k")) / 8**0.5
    return torch.einsum("nhls,nhsd->nhld", fq(logits.softmax(-1), "w"), fq(v, "v"))


@pytest.mark.parametrize("prescale", [False, True])
def test_quantizes_the_four_operands(qkv, prescale, relative):
    out = quantized(core_with_ranges(prescale), *qkv)
    assert relative(out, reference(*qkv, prescale)) < OUTPUT_TOLERANCE
    assert relative(out, reference(*qkv, not prescale)) > OUTPUT_TOLERANCE
    for name in DELTAS:
        planted = reference(*qkv, prescale, {**DELTAS, name: DELTAS[name] * 1.01})
        assert relative(out, planted) > OUTPUT_TOLERANCE, name


@pytest.mark.parametrize("prescale", [False, True])
def test_float_takes_the_fused_path(qkv, prescale, monkeypatch):
    core = core_with_ranges(prescale)
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    assert torch.equal(core(*qkv), fused(*qkv))
    assert calls == [1]
    with leaf_modes([core], weights=True, activations=False):
        core(*qkv)
    assert calls == [1, 1]
    quantized(core, *qkv)
    assert calls == [1, 1]


def test_a_query_that_sees_no_key_attends_to_nothing(qkv):
    """As in the fused kernel; boolean masks of padded prompts have such rows."""
    seen = torch.ones(5, 7, dtype=torch.bool)
    seen[2] = False
    with leaf_modes([core := core_with_ranges()], weights=False, activations=True), torch.no_grad():
        out = core(*qkv, seen)
    assert torch.equal(out[:, :, 2], torch.zeros(2, 3, 8).double())
    assert torch.isfinite(out).all() and (out[:, :, 3] != 0).all()


def test_softmax_has_its_own_width_and_no_negative_levels():
    core = QuantAttention(AttentionCore(), QuantConfig(4, 8, act_symmetric=True, softmax_bits=16))
    assert [getattr(core, f"act_quantizer_{o}").bits for o in "qkvw"] == [8, 8, 8, 16]
    assert core.act_quantizer_w.unsigned and not core.act_quantizer_q.unsigned


def test_wide_quantizers_approach_float(qkv, relative):
    core = QuantAttention(AttentionCore(), QuantConfig(4, 16, softmax_bits=16))
    for name in "qkv":
        getattr(core, f"act_quantizer_{name}").set(torch.tensor(10 / 65535), torch.tensor(32768))
    core.act_quantizer_w.set(torch.tensor(1 / 65535), torch.tensor(0))
    assert relative(quantized(core, *qkv), AttentionCore()(*qkv)) < 1e-3  # 16 bits: steps of 1.5e-4
    core.act_quantizer_v.set(torch.tensor(10 / 255), torch.tensor(128))
    assert relative(quantized(core, *qkv), AttentionCore()(*qkv)) > 1e-3


def test_no_parameters_in_float_checkpoints():
    assert not AttentionCore().state_dict()
    assert not QuantAttention(AttentionCore(), QuantConfig(4, None)).state_dict()
