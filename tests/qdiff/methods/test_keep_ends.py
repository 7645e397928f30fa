"""8-bit ends: which layers they are, what they cost, and that files of such networks go where they belong."""

from __future__ import annotations

import copy

import pytest
import torch
from stored_size import content_bytes

from qdiff.calibration.run import CalibrationRun
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.errors import UserError
from qdiff.methods import eda_dm
from qdiff.methods.eda_dm import EdaDmConfig
from qdiff.quant_model import QuantModel

W4A8 = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True}
FIRST, LAST = "conv_in", "conv_out"
IMAGE = (1, 8, 8)


@pytest.fixture
def saved(wrap, data, tmp_path):
    """``saved(**config)``: a network calibrated a little, and its file."""

    def made(**config):
        qnn = wrap(**W4A8, **config)
        recipe = EdaDmConfig(iterations=2, batch_size=5, lr_rounding=0.1, layer_weight=0.5)
        eda_dm.calibrate(qnn, data, recipe, CalibrationRun(show_progress=False))
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_checkpoint(qnn, path)
        return qnn, path

    return made


def test_the_ends_are_the_layers_that_take_the_input_and_give_the_output(wrap, data, run_quantized):
    """By execution order, not by the names that the family registered."""
    qnn, order = wrap(**W4A8, keep_ends=True), []
    for name, layer in qnn.layers().items():
        layer.register_forward_hook(lambda m, args, out, name=name: order.append((name, args[0], out)))
    out = qnn(*data.inputs)
    first = next(name for name, given, _ in order if given.shape == data.inputs[0].shape)
    assert first == FIRST and order[-1][0] == LAST and torch.equal(order[-1][2], out)


def test_widths(wrap):
    plain = {n: (len(layer.act_quantizers), *widths(layer)) for n, layer in wrap(**W4A8).layers().items()}
    kept = {
        n: (len(layer.act_quantizers), *widths(layer)) for n, layer in wrap(**W4A8, keep_ends=True).layers().items()
    }
    assert plain[FIRST] == plain[LAST] == (1, 4)
    assert kept[FIRST] == (1, 8) and kept[LAST] == (0, 8)
    assert {n for n in plain if plain[n] != kept[n]} == {FIRST, LAST}


def widths(layer):
    return [q.bits for q in layer.weight_quantizers]


@pytest.mark.parametrize("bits", [2, 8])
def test_whatever_the_width(bits, wrap):
    qnn = wrap(**{**W4A8, "weight_bits": bits}, keep_ends=True)
    assert widths(qnn.layers()[FIRST]) == widths(qnn.layers()[LAST]) == [8]
    assert widths(qnn.model.down[0].block[0].conv1) == [bits]


def test_without_widths_nothing_is_kept(wrap):
    qnn = wrap(weight_bits=None, act_bits=8, keep_ends=True)
    assert not any(len(layer.weight_quantizers) for layer in qnn.layers().values())
    assert len(qnn.layers()[LAST].act_quantizers) == 0 and len(qnn.layers()[FIRST].act_quantizers) == 1
    assert wrap(weight_bits=4, act_bits=None, keep_ends=True).act_quantizers() == {}


def test_a_network_without_known_ends_says_so():
    with pytest.raises(UserError, match=r"Linear .*keep_ends"):
        QuantModel(torch.nn.Linear(2, 2), QuantConfig(4, keep_ends=True))


@pytest.mark.slow
def test_saved_and_loaded_it_is_the_same(saved, wrap, held_out, run_quantized):
    qnn, path = saved(keep_ends=True)
    loaded = wrap(**W4A8, keep_ends=True)
    load_checkpoint(loaded, path)
    out = run_quantized(qnn, held_out)
    assert torch.equal(run_quantized(loaded, held_out), out)
    assert int(qnn.layers()[LAST].weight_int.max()) > 15  # more than 4 bits can say
    layer = loaded.layers()[LAST]  # planted: one level of the last layer
    changed = layer.weight_int.clone()
    changed[0, 0, 0, 0] ^= 1
    layer.set_weight_int(changed)
    assert not torch.equal(run_quantized(loaded, held_out), out)


@pytest.mark.slow
@torch.no_grad()
def test_the_last_layer_is_fed_floats(saved, held_out):
    qnn, _ = saved(keep_ends=True)
    seen = []
    qnn.layers()[LAST].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with qnn.quantized():
        out = qnn(*held_out)
    layer = qnn.layers()[LAST]
    expected = torch.nn.functional.conv2d(seen[0], layer.dequantized_weight(), layer.bias, padding=1)
    assert torch.equal(out, expected)
    assert len(seen[0].unique()) > 256


@pytest.mark.slow
def test_size_and_cost(saved):
    kept, kept_path = saved(keep_ends=True)
    plain, plain_path = saved()
    for qnn, path in ((kept, kept_path), (plain, plain_path)):
        assert content_bytes(path) == account(qnn, IMAGE).size_bytes
    weights = [kept.layers()[n].weight for n in (FIRST, LAST)]
    # Half a byte more for each weight of the ends and each of their zero points, δ and z of one activation less.
    more = sum(w.numel() // 2 + w.shape[0] // 2 for w in weights)
    assert content_bytes(kept_path) - content_bytes(plain_path) == more - 8
    costs = {layer.name: layer for layer in account(kept, IMAGE).layers}
    assert (costs[FIRST].weight_bits, costs[FIRST].act_bits) == (8, 8)
    assert (costs[LAST].weight_bits, costs[LAST].act_bits) == (8, 32)
    assert (costs["mid.block_1.conv1"].weight_bits, costs["mid.block_1.conv1"].act_bits) == (4, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("there", "says"), [(True, "add --keep_ends"), (False, "leave out --keep_ends")])
def test_a_file_of_the_other_kind_is_refused(there, says, saved, wrap):
    _, path = saved(keep_ends=there)
    other = wrap(**W4A8, keep_ends=not there)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UserError, match=says) as caught:
        load_checkpoint(other, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.slow
def test_weights_of_a_file_alone(saved, wrap, held_out, run_quantized):
    qnn, path = saved(keep_ends=True)
    loaded = wrap(**{**W4A8, "act_bits": None}, keep_ends=True)
    load_checkpoint(loaded, path)
    assert torch.equal(run_quantized(loaded, held_out), run_quantized(qnn, held_out, activations=False))
