"""Operations and state of networks that modulate, by hand and against what a trajectory keeps."""

from __future__ import annotations

import json

import pytest
import torch
from stored_size import content_bytes, stored_bytes
from toy_network import TINY, TOY, Toy, by_name

from qdiff.checkpoint.native import save_native
from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.quant_model import QuantModel

MODULATED = {"weight_bits": 4, "act_bits": 3, "act_dynamic": True, "modulate": True}


@pytest.mark.parametrize(("rest_bits", "first"), [(None, 32), (8, 8)])
def test_modulated_toy_by_hand(rest_bits, first):
    counts = account(QuantModel(Toy(), QuantConfig(**MODULATED, rest_bits=rest_bits)), *TOY)
    layers = by_name(counts)
    # Elements of one sample's input and output.
    sizes = {"conv": (4 * 8 * 8, 8 * 4 * 4), "linear": (16 * 8, 16 * 6), "conv1d": (6 * 16, 6 * 16)}
    for name, (inputs, outputs) in sizes.items():
        layer = layers[name]
        assert layer.state_bytes == 4 * (inputs + outputs)
        assert layer.additions == 2 * inputs + outputs
        assert (layer.act_bits, layer.first_act_bits) == (3, first)
        assert (layer.bops, layer.first_bops) == (layer.macs * 4 * 3, layer.macs * 4 * first)
        assert {"first_act_bits", "state_bytes", "additions", "first_bops"} <= set(layer.to_dict())
    others = [layer for name, layer in layers.items() if name not in sizes]
    assert all(layer.state_bytes == layer.additions == 0 and layer.first_act_bits is None for layer in others)
    products = (480 + 640) * first**2  # attention does not modulate; its width is that of the first call
    assert counts.bops == (2304 + 768 + 576) * 4 * 3 + products
    assert counts.first_bops == (2304 + 768 + 576) * 4 * first + products
    assert counts.state_bytes == 4 * sum(map(sum, sizes.values()))
    assert counts.additions == sum(2 * i + o for i, o in sizes.values())


def test_a_trajectory_is_one_first_call_and_later_ones():
    counts = account(QuantModel(Toy(), QuantConfig(**MODULATED)), *TOY)
    assert counts.bops_over(1) == counts.first_bops > counts.bops
    assert counts.bops_over(4) == (counts.first_bops + 3 * counts.bops) / 4
    assert counts.bops < counts.bops_over(1000) < counts.bops_over(999)
    summary = json.loads(json.dumps(counts.summary(calls=4)))
    assert (summary["bops"], summary["calls"]) == (counts.bops_over(4), 4)
    assert summary["first_bops"] == counts.first_bops
    assert (summary["state_bytes"], summary["additions"]) == (counts.state_bytes, counts.additions)
    assert (counts.summary()["bops"], counts.summary()["calls"]) == (counts.bops, None)
    with pytest.raises(ValueError, match="0 calls"):
        counts.bops_over(0)


@pytest.mark.parametrize("options", [None, {"weight_bits": 4, "act_bits": 8}, {"act_bits": 4, "act_dynamic": True}])
def test_without_modulation_every_call_is_the_same(options, tiny_network, wrap):
    counts = account(tiny_network if options is None else wrap(**options), TINY)
    assert counts.first_bops == counts.bops == counts.bops_over(1) == counts.bops_over(7)
    assert counts.state_bytes == counts.additions == 0 and not counts.modulates
    # What older runs wrote down: keys, values and their types.
    assert list(counts.summary(calls=7)) == [
        *("size_bytes", "parameters", "macs", "bops", "image_shape", "context_shape", "batch")
    ]
    assert counts.summary(calls=7) == counts.summary() and type(counts.summary(calls=7)["bops"]) is int
    keys = {"name", "kind", "parameters", "size_bytes", "macs", "weight_bits", "act_bits", "bops"}
    assert all(set(layer.to_dict()) == keys for layer in counts.layers)


@pytest.mark.parametrize("split", [False, True])
def test_state_is_what_a_trajectory_keeps(split, wrap):
    """Counted from shapes, and found in the layers' memories after a step."""
    qnn = wrap(**{**MODULATED, "weight_bits": None}, split_shortcut=split)
    counts = account(qnn, TINY)
    with torch.no_grad(), qnn.quantized(weights=False), qnn.trajectory():
        qnn(torch.zeros(3, *TINY), torch.zeros(3))
        kept = {name: layer.memory.bytes for name, layer in qnn.layers().items()}
    assert {layer.name: 3 * layer.state_bytes for layer in counts.layers if layer.modulates} == kept
    assert 3 * counts.state_bytes == sum(kept.values())


def test_slices_of_different_widths_share_one_output(wrap):
    qnn = wrap(**MODULATED, split_shortcut=True)
    name, layer = next((n, m) for n, m in qnn.layers().items() if len(m.slices) == 2)
    whole = by_name(account(qnn, TINY))[name]
    layer.act_quantizers[1].bits = 5
    first, second = (by_name(account(qnn, TINY))[f"{name}[{i}]"] for i in (0, 1))
    assert (first.act_bits, second.act_bits, first.first_act_bits, second.first_act_bits) == (3, 5, 32, 32)
    for kind in ("state_bytes", "additions", "first_bops"):
        assert getattr(first, kind) + getattr(second, kind) == getattr(whole, kind)
    # The second one has inputs alone, 4 bytes and 2 additions an element; inputs fall to both as channels do.
    assert second.state_bytes == 2 * second.additions
    inputs = first.additions - first.state_bytes // 4, second.additions // 2
    assert inputs[0] * layer.slices[1] == inputs[1] * layer.slices[0]


def test_layers_that_stay_in_float_do_not_modulate(wrap):
    qnn = wrap(**MODULATED, keep_ends=True)
    layers = [layer for layer in account(qnn, TINY).layers if layer.kind in ("Conv2d", "Linear")]
    assert [layer.name for layer in layers if not layer.modulates] == ["conv_out"]


def test_a_cleared_state_makes_every_call_a_first_one():
    whole, cleared = (
        account(QuantModel(Toy(), QuantConfig(**MODULATED, ablation=a)), *TOY) for a in (None, "cleared-state")
    )
    assert cleared.bops == cleared.first_bops == cleared.bops_over(9) == whole.first_bops > whole.bops
    assert cleared.additions == 0 and cleared.state_bytes == whole.state_bytes


@pytest.mark.parametrize("options", [{}, {"modulate": True}, {"modulate": True, "rest_bits": 8}], ids=str)
def test_ranges_at_hand_take_no_bytes(options, calibrated, tmp_path):
    qnn = calibrated(weight_bits=4, act_bits=4, act_dynamic=True, split_shortcut=True, **options)
    save_native(qnn, tmp_path / "a.safetensors", {})
    content = content_bytes(tmp_path / "a.safetensors")
    assert account(qnn, TINY).size_bytes == content == stored_bytes(qnn)
