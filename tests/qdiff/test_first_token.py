"""Layers that do not quantize the first token of a context (``bos_aware``): values, modes, files and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from text_network import READERS, READERS_ALONE, TextNetwork, other_texts, text_data, text_network, texts, wrapped

import qdiff
from qdiff.calibration.run import CalibrationRun
from qdiff.checkpoint import load_checkpoint, load_packed, save_checkpoint
from qdiff.checkpoint.metadata import CHECKSUM, checksum, read_metadata
from qdiff.checkpoint.native import content_hash
from qdiff.cost.account import account
from qdiff.deploy.weight_format import WriteOptions
from qdiff.deploy.weight_plan import plan_weights
from qdiff.errors import UserError
from qdiff.functional import fake_quantize
from qdiff.modes import first_tokens
from qdiff.quant_model import QuantModel
from qdiff.ranges.first_token import TOLERANCE, is_same_token
from qdiff.ranges.qparams import qparams

ROUNDING = 1e-8  # relative L2; step sizes are chosen in float32. One token in another range is above 1e-4


def calibrated(method="linear", dtype=torch.float32, inputs=None, **config) -> QuantModel:
    qnn = wrapped(dtype, **config)
    data = text_data(dtype=dtype) if inputs is None else inputs
    qdiff.calibrate(qnn, data, method, run=CalibrationRun(show_progress=False))
    return qnn


def relative(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


def quantized(values, dims, bits):
    """Return x ≈ δ·(q − z) with the range of the extremes over some dimensions."""
    low, high = values.amin(dims, keepdim=True), values.amax(dims, keepdim=True)
    return fake_quantize(values, *qparams(low, high, bits, False), bits)


@torch.no_grad()
def test_a_layer_is_float_for_the_first_token_and_quantized_for_the_others():
    qnn, (_, _, context) = calibrated(dtype=torch.float64), texts(dtype=torch.float64)
    for name in READERS:
        layer = qnn.layers()[name]
        weight = layer.float_weight()
        rest = F.linear(quantized(context[:, 1:], (0, 1, 2), 8), quantized(weight, 1, 4))
        expected = torch.cat([F.linear(context[:, :1], weight), rest], dim=1)
        with qnn.quantized():
            assert relative(layer(context), expected) < ROUNDING
        assert torch.equal(layer(context), F.linear(context, weight))  # in float, nothing is a constant
        planted = F.linear(quantized(context, (0, 1, 2), 8), quantized(weight, 1, 4))
        assert relative(planted[:, 1:], rest) > 1e-4
    assert [token.input is None for token in first_tokens(qnn.model).values()] == [False, True]


@torch.no_grad()
@pytest.mark.parametrize("method", ["linear", "gptq"])
def test_a_large_first_token_spoils_a_layer_that_does_not_leave_it_out(method):
    """A first token of 80 times the others' magnitude, against float64; everything else is in float."""
    inputs = texts(seed=2, dtype=torch.float64)
    errors = {}
    for bos_aware in (False, True):
        qnn = calibrated(method, torch.float64, bos_aware=bos_aware, layer_bits=READERS_ALONE)
        with qnn.quantized():
            errors[bos_aware] = float((qnn(*inputs) - text_network(torch.float64)(*inputs)).square().mean())
    assert errors[True] < 0.1 * errors[False]


@torch.no_grad()
def test_a_first_token_like_the_others_makes_little_difference():
    data = text_data(magnitude=1.0)
    errors = {}
    for bos_aware in (False, True):
        qnn = calibrated(inputs=data, bos_aware=bos_aware, layer_bits=READERS_ALONE)
        with qnn.quantized():
            errors[bos_aware] = float((qnn(*data.inputs) - text_network()(*data.inputs)).square().mean())
    assert 0.2 < errors[True] / errors[False] < 1.2


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [{}, {"act_dynamic": True, "act_scale_per": "sample"}, {"act_ranges": "timestep"}, {"weight_bits": None}],
    ids=["shared", "dynamic", "timestep", "activations"],
)
def test_a_file_a_state_dict_and_packed_weights_hold_it(config, tmp_path):
    qnn, inputs, path = calibrated(**config), texts(seed=2), tmp_path / "q.safetensors"
    with qnn.quantized():
        expected = qnn(*inputs)
    save_checkpoint(qnn, path)
    loaded, stated = wrapped(**config), wrapped(**config)
    load_checkpoint(loaded, path)
    stated.load_state_dict(qnn.state_dict())
    found = [loaded, stated]
    if qnn.config.weight_bits is not None:
        with torch.device("meta"):
            empty = TextNetwork()
        found.append(load_packed(empty, path))
    for other in found:
        with other.quantized():
            assert torch.equal(other(*inputs), expected)
        assert len(first_tokens(other.model)) == 2
    for other in found[:1]:
        assert content_hash(other) == content_hash(qnn)
        other.layers()[READERS[1]].first_token.output[0] += 1
        assert content_hash(other) != content_hash(qnn)
    if not config.get("act_dynamic") and qnn.config.weight_bits:
        integers = wrapped(**config)
        load_checkpoint(integers, path)
        integers.pack_weights(integer=True)
        with integers.quantized():
            assert relative(integers(*inputs), expected) < 1e-4


@torch.no_grad()
def test_modulated_layers_take_changes_of_the_other_tokens():
    config = {"modulate": True, "act_dynamic": True, "layer_bits": READERS_ALONE}
    qnn, (x, _, context) = calibrated(**config), texts()
    moved = context.clone()
    moved[:, 1:] += 0.1
    layer = qnn.layers()[READERS[0]]
    with qnn.quantized(), qnn.trajectory():
        layer(context)
        found = layer(moved)
        assert layer.memory.input.shape[1] == context.shape[1] - 1
    assert torch.equal(found[:, :1], layer.first_token.output.expand(len(x), 1, -1))
    assert relative(found, layer(moved)) < 0.1


@torch.no_grad()
def test_a_context_that_begins_with_another_token_is_an_error():
    qnn = calibrated()
    same, other = texts(seed=3), other_texts(seed=3)
    with qnn.quantized():
        assert qnn(*same).isfinite().all()
        with pytest.raises(UserError, match="begins with another token than in calibration"):
            qnn(*other)
    qnn(*other)  # the float network takes any


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_make_it_another_token(dtype):
    token = texts()[2][0, :1]
    assert is_same_token(token.to(dtype), token[0]).all()
    assert not is_same_token(token * (1 + 2 * TOLERANCE), token[0]).any()
    assert not is_same_token(token * torch.nan, token[0]).any()


@torch.no_grad()
def test_on_a_gpu_no_call_waits_and_another_token_is_told_at_the_end(cuda):
    qnn, inputs = calibrated(), texts(seed=2)
    with qnn.quantized():
        expected = qnn(*inputs)
    qnn.to("cuda")
    moved, other = (tuple(i.to("cuda") for i in some) for some in (inputs, other_texts(seed=2)))
    with qnn.quantized():
        qnn(*moved)
        with cuda.counting() as counts:
            found = qnn(*moved)
    assert counts.waits == [] and torch.equal(found.cpu(), expected)
    with pytest.raises(UserError, match="begins with another token"), qnn.quantized():
        out = qnn(*other)
        assert out[-1].isnan().any() and out[:-1].isfinite().all()
        qnn(*moved)
    with qnn.quantized():  # it is told once, and in sampling for every batch
        qnn(*moved)
        with pytest.raises(UserError, match="begins with another token"), qnn.trajectory():
            qnn(*other)


def test_without_a_calibration_nothing_is_known():
    qnn = wrapped()
    with pytest.raises(UserError, match="no layer knows what it makes of the context's first token"), qnn.quantized():
        pass


def test_its_cost_is_counted():
    shapes = (2, 4, 4), (5, 8)
    qnn, without = calibrated(), wrapped(bos_aware=False)
    found, before, plain = (account(network, *shapes) for network in (qnn, wrapped(), without))
    assert found == before  # also before calibration
    assert found.size_bytes - plain.size_bytes == 4 * (8 + 8 + 8)  # two outputs and the token
    costs, usual = ({cost.name: cost for cost in counted.layers} for counted in (found, plain))
    for name, cost in costs.items():
        assert cost.macs == usual[name].macs * 4 // 5 if name in READERS else cost.macs == usual[name].macs


def test_formats_without_a_place_for_it_refuse(tmp_path):
    qnn = calibrated()
    with pytest.raises(UserError, match="no place for outputs of the first token; save the native format"):
        save_checkpoint(qnn, tmp_path / "published.pth", format="published")
    options = WriteOptions(dtype=torch.float32) if "dtype" in WriteOptions.__dataclass_fields__ else WriteOptions()
    with pytest.raises(UserError, match="ComfyUI has no place for outputs of the first token"):
        plan_weights(qnn, "ComfyUI", lambda layer: None, options)
    plain = calibrated(bos_aware=False)
    save_checkpoint(plain, tmp_path / "plain.pth", format="published")
    with pytest.raises(UserError, match="a published file, which quantizes all tokens; leave out --bos_aware"):
        load_checkpoint(wrapped(), tmp_path / "plain.pth")


def test_a_file_of_the_other_kind_or_damaged_is_refused(tmp_path):
    path, plain = tmp_path / "q.safetensors", tmp_path / "plain.safetensors"
    save_checkpoint(calibrated(), path)
    save_checkpoint(calibrated(bos_aware=False), plain)
    with pytest.raises(UserError, match="add --bos_aware"):
        load_checkpoint(wrapped(bos_aware=False), path)
    with pytest.raises(UserError, match="leave out --bos_aware"):
        load_checkpoint(wrapped(), plain)
    metadata, tensors = read_metadata(path), load_file(path)
    assert "first_token" not in load_file(plain)
    parts = tensors["first_token_parts"]
    for planted in (parts * 0, parts[:-1], parts + 2):
        damaged = {**tensors, "first_token_parts": planted}
        save_file(damaged, path, metadata={**metadata, CHECKSUM: checksum(damaged, metadata)})
        with pytest.raises(UserError, match="damaged"):
            load_checkpoint(wrapped(), path)
