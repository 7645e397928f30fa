"""Finer step sizes of single channels in files, and what has no place for them."""

from __future__ import annotations

import copy

import pytest
import torch
from thorough import thorough_except
from uneven_network import uneven

from qdiff import QuantConfig, QuantModel
from qdiff.api import calibrate
from qdiff.calibration.run import CalibrationRun
from qdiff.checkpoint import load_checkpoint, load_packed, save_checkpoint
from qdiff.checkpoint.native import content_hash
from qdiff.config import ActRanges
from qdiff.cost.account import account
from qdiff.errors import UserError

W4A8 = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True}
SUMMATION = 1e-9  # relative, in float64


@pytest.fixture
def wrap(tiny_network):
    """``wrap(**config)``: the uneven tiny network, wrapped and not calibrated."""
    network = uneven(tiny_network)
    return lambda **config: QuantModel(copy.deepcopy(network), QuantConfig(**{**W4A8, **config}))


@pytest.fixture
def made(wrap, data):
    """``made(**config)``: the same, calibrated with finer step sizes."""

    def calibrated(**config):
        qnn = wrap(power_of_two_scales=True, **config)
        calibrate(qnn, data, "linear", run=CalibrationRun(show_progress=False))
        assert any(k.any() for k in shifts(qnn))
        return qnn

    return calibrated


def shifts(qnn):
    return [q.channel_shifts for q in qnn.act_quantizers().values() if q.channel_shifts is not None]


@torch.no_grad()
def output(qnn, inputs):
    with qnn.quantized():
        return qnn(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize("ranges", thorough_except(ActRanges, ActRanges.TIMESTEP))
def test_a_native_file_holds_them(ranges, made, wrap, tiny_network, data, tmp_path):
    qnn, loaded = made(act_ranges=ranges), wrap(power_of_two_scales=True, act_ranges=ranges)
    path = tmp_path / "native"
    save_checkpoint(qnn, path)
    load_checkpoint(loaded, path)
    packed = load_packed(tiny_network.to("meta"), path)
    for other in (loaded, packed):
        assert all(torch.equal(a, b) for a, b in zip(shifts(other), shifts(qnn), strict=True))
        assert torch.equal(output(other, data.inputs), output(qnn, data.inputs))
        assert content_hash(other) == content_hash(qnn)
    shifts(loaded)[1][0, 0] += 1
    assert content_hash(loaded) != content_hash(qnn)


@pytest.mark.slow
@pytest.mark.parametrize("ranges", ActRanges)
@pytest.mark.parametrize("weight_bits", [4, 8])
@torch.no_grad()
def test_integer_products_are_what_is_simulated(weight_bits, ranges, made, data, relative):
    qnn = made(weight_bits=weight_bits, act_ranges=ranges).double()
    given = data.inputs[0].double(), data.inputs[1]
    wanted = output(qnn, given)
    qnn.pack_weights(integer=True)
    assert relative(output(qnn, given), wanted) < SUMMATION
    for k in shifts(qnn):  # planted: all channels have the step size of the tensor
        k.zero_()
    assert relative(output(qnn, given), wanted) > 1e3 * SUMMATION


def test_files_from_before_fit(wrap, data, tmp_path):
    qnn = wrap()
    calibrate(qnn, data, "linear", run=CalibrationRun(show_progress=False))
    save_checkpoint(qnn, tmp_path / "native")
    save_checkpoint(qnn, tmp_path / "published", format="published")
    for name in ("native", "published"):
        loaded = wrap(power_of_two_scales=True)
        for k in shifts(loaded):
            k.fill_(1)
        load_checkpoint(loaded, tmp_path / name)
        assert torch.equal(output(loaded, data.inputs), output(qnn, data.inputs)), name


def test_what_has_no_place_for_them_is_refused(made, wrap, tmp_path):
    qnn = made()
    save_checkpoint(qnn, tmp_path / "native")
    with pytest.raises(UserError, match=r"finer step sizes for single channels; give --power_of_two_scales") as caught:
        load_checkpoint(wrap(), tmp_path / "native")
    assert "\n" not in str(caught.value)
    load_checkpoint(wrap(), tmp_path / "native", activations=False)  # its weights do not depend on them
    with pytest.raises(UserError, match=r"one step size per quantizer \(up\.\S+ has finer ones.*save the native"):
        save_checkpoint(qnn, tmp_path / "x", format="published")
    assert not (tmp_path / "x").exists()
    for k in shifts(qnn):
        k.zero_()
    save_checkpoint(qnn, tmp_path / "published", format="published")


def test_the_account_counts_two_bits_each(wrap):
    sizes = [account(wrap(power_of_two_scales=given), (1, 8, 8)).size_bytes for given in (False, True)]
    channels = sum(layer.in_channels for name, layer in wrap().layers().items() if "nin_shortcut" in name)
    assert sizes[1] - sizes[0] == channels // 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"act_bits": None}, "--power_of_two_scales needs quantized activations; add --quant_act"),
        ({"act_dynamic": True}, "--power_of_two_scales .* contradicts --quant_mode dynamic"),
        ({"modulate": True}, "--power_of_two_scales .* contradicts --modulate"),
    ],
)
def test_contradictions(config, words):
    with pytest.raises(UserError, match=words) as caught:
        QuantConfig(**{**W4A8, "power_of_two_scales": True, **config})
    assert "\n" not in str(caught.value)


def test_the_config_is_what_it_was_without_them():
    assert "power_of_two_scales" not in QuantConfig(4, 8).to_dict()
    config = QuantConfig(4, 8, power_of_two_scales=True, keep_ends=True, layer_bits={"nin_shortcut": "A32"})
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert not config.of_layer("nin_shortcut", None).power_of_two_scales
