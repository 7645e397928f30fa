"""Released float weights: the same quantized output from one copy of the weights, and errors where float is needed."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file

from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.errors import UserError
from qdiff.weight_forms import WeightForm

W4A8 = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split_shortcut": True}


def float_bytes(qnn):
    """Bytes of everything of floating point that the network holds, dequantized weights included."""
    tensors = [*qnn.parameters(), *qnn.buffers()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.is_floating_point()}
    return sum(held.values())


@pytest.mark.parametrize("config", [W4A8, {"weight_bits": 4}, {"weight_bits": 8, "act_bits": 8}], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_the_quantized_output_stays(config, inside, calibrated, held_out, run_quantized):
    qnn = calibrated(**config)
    expected = run_quantized(qnn, held_out)
    if inside:  # with dequantized weights lying about
        with qnn.quantized():
            qnn.release_float_weights()
            with torch.no_grad():
                assert torch.equal(qnn(*held_out), expected)
    else:
        qnn.release_float_weights()
    qnn.release_float_weights()  # again
    assert torch.equal(run_quantized(qnn, held_out), expected)
    assert torch.equal(run_quantized(qnn, held_out), expected)


def test_one_float_copy_of_the_weights_is_held(calibrated, held_out):
    qnn = calibrated(**W4A8)
    weights = sum(layer.weight.numel() * 4 for layer in qnn.layers().values())
    before = float_bytes(qnn)
    with qnn.quantized():
        assert float_bytes(qnn) == before + weights  # two copies: what releasing is for
    qnn.release_float_weights()
    assert float_bytes(qnn) == before
    with qnn.quantized(), torch.no_grad():
        qnn(*held_out)
        assert float_bytes(qnn) == before
        assert all(layer.quantized_weight() is layer.weight for layer in qnn.layers().values()), "no copies in passing"
    with qnn.quantized(activations=False):
        assert float_bytes(qnn) == before


def test_float_weights_are_an_error_afterwards(calibrated, held_out):
    qnn = calibrated(**W4A8)
    qnn.release_float_weights()
    with pytest.raises(RuntimeError, match="were released; load it again"):
        qnn(*held_out)
    with pytest.raises(RuntimeError, match="were released"), qnn.quantized(weights=False):
        qnn(*held_out)
    with qnn.quantized(activations=False):
        qnn(*held_out)


def test_an_uncalibrated_network_keeps_its_weights(wrap, held_out):
    qnn = wrap(**W4A8)
    expected = qnn(*held_out)
    with pytest.raises(UserError, match="weight quantizer"):
        qnn.release_float_weights()
    assert torch.equal(qnn(*held_out), expected)


def test_without_weight_width_there_is_nothing_to_release(calibrated, held_out, run_quantized):
    qnn = calibrated(weight_bits=None, act_bits=8)
    expected = run_quantized(qnn, held_out), qnn(*held_out)
    qnn.release_float_weights()
    assert torch.equal(run_quantized(qnn, held_out), expected[0])
    assert torch.equal(qnn(*held_out), expected[1])


def test_native_files_do_not_need_float_weights(calibrated, wrap, held_out, run_quantized, tmp_path):
    qnn = calibrated(**W4A8)
    save_checkpoint(qnn, tmp_path / "before")
    expected = run_quantized(qnn, held_out)
    qnn.release_float_weights()
    save_checkpoint(qnn, tmp_path / "after")
    before, after = load_file(tmp_path / "before"), load_file(tmp_path / "after")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    target = wrap(**W4A8)
    load_checkpoint(target, tmp_path / "after")
    assert torch.equal(run_quantized(target, held_out), expected)


def test_published_files_would_hold_wrong_float_weights(calibrated, tmp_path):
    """The dequantized weights agree with their own integers, so only a flag can tell."""
    qnn = calibrated(weight_bits=4)
    save_checkpoint(qnn, tmp_path / "before.pth", format="published")
    qnn.release_float_weights()
    with pytest.raises(UserError, match="released; save it before"):
        save_checkpoint(qnn, tmp_path / "after.pth", format="published")
    assert not (tmp_path / "after.pth").exists()
    for layer in qnn.layers().values():
        layer._form = WeightForm.FLOAT
    save_checkpoint(qnn, tmp_path / "after.pth", format="published")  # planted: without the flag
    before, after = (torch.load(tmp_path / f"{n}.pth", weights_only=True) for n in ("before", "after"))
    assert not torch.equal(before["model.conv_in.weight"], after["model.conv_in.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["native", "published"])
def test_another_checkpoint_takes_effect(format, calibrated, wrap, held_out, run_quantized, tmp_path):
    """Integers that come after the release must not leave the weights of before."""
    source = calibrated(**W4A8)
    with torch.no_grad():
        for layer in source.layers().values():
            layer.weight.mul_(-1)
            layer.init_weight_ranges(source.config.weight_range)
    save_checkpoint(source, tmp_path / "q", format=format)
    fresh, released = wrap(**W4A8), calibrated(**W4A8)
    load_checkpoint(fresh, tmp_path / "q")
    expected, before = run_quantized(fresh, held_out), run_quantized(released, held_out)
    released.release_float_weights()
    load_checkpoint(released, tmp_path / "q")
    assert torch.equal(run_quantized(released, held_out), expected)
    assert not torch.equal(expected, before)


def test_a_state_dict_is_refused_afterwards(calibrated):
    qnn = calibrated(**W4A8)
    state = copy.deepcopy(qnn.state_dict())
    qnn.release_float_weights()
    with pytest.raises(RuntimeError, match="build it again"):
        qnn.load_state_dict(state)
