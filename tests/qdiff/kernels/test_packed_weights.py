"""Packed weights: the same output bit for bit from the integers alone, and errors where floats are needed."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from stored_size import content_bytes
from thorough import thorough_except
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddim.models.diffusion import Model
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.checkpoint import load_checkpoint, load_packed, save_checkpoint
from qdiff.checkpoint.metadata import read_metadata
from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.errors import UserError
from qdiff.kernels.packing import packed_bytes
from qdiff.methods import eda_dm, linear, modiff, qdiffusion
from qdiff.methods.eda_dm import EdaDmConfig
from qdiff.methods.modiff import ChangesConfig
from qdiff.methods.qdiffusion import QDiffusionConfig

W4A8 = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split_shortcut": True}
MODULATED = {"weight_bits": 4, "act_bits": 4, "act_dynamic": True, "modulate": True, "split_shortcut": True}
CONFIGS = [
    W4A8,
    {"weight_bits": 4},
    {"weight_bits": 8, "act_bits": 8},
    {"weight_bits": 3, "weight_symmetric": True, "keep_ends": True},
    MODULATED,
]
ALL = 1 << 30


@torch.no_grad()
def outputs(qnn, given, calls=3):
    """Several calls of a trajectory: the second one finds what the first one put into a cache."""
    with qnn.quantized(), qnn.trajectory():
        return [qnn(given[0] * (1 + 0.05 * i), given[1]) for i in range(calls)]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def same_files(one, other):
    """The order of the metadata in a file is arbitrary."""
    a, b = load_file(one), load_file(other)
    return read_metadata(one) == read_metadata(other) and a.keys() == b.keys() and same(a.values(), [b[k] for k in a])


def held_bytes(qnn):
    """Bytes of everything that the network holds values of."""
    tensors = [t for t in (*qnn.parameters(), *qnn.buffers()) if not t.is_meta]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("cache_bytes", thorough_except([0, 300_000, ALL], 300_000))
def test_the_quantized_output_stays(config, cache_bytes, calibrated, held_out):
    qnn = calibrated(**config)
    expected = outputs(qnn, held_out)
    weight_only = "act_bits" in config and not config.get("modulate")
    if weight_only:
        with torch.no_grad(), qnn.quantized(activations=False):
            without = qnn(*held_out)
    qnn.pack_weights(cache_bytes)
    assert same(outputs(qnn, held_out), expected)
    assert same(outputs(qnn, held_out), expected)
    if weight_only:
        with torch.no_grad(), qnn.quantized(activations=False):
            assert torch.equal(qnn(*held_out), without)
    layer = qnn.layers()["mid.block_1.conv1"]  # planted: one level of one weight
    layer.packed.stream[0] ^= 1
    layer.packed.cache.clear()
    assert not same(outputs(qnn, held_out), expected)


def test_packing_while_quantized(calibrated, held_out):
    qnn = calibrated(**W4A8)
    with qnn.quantized(), torch.no_grad():
        expected = qnn(*held_out)
        qnn.pack_weights()
        assert all(layer.weight_dequantized is None for layer in qnn.layers().values())
        assert torch.equal(qnn(*held_out), expected)


@pytest.mark.slow
def test_packing_released_weights_and_releasing_packed_ones(calibrated, held_out):
    qnn = calibrated(**W4A8)
    expected = outputs(qnn, held_out)
    qnn.release_float_weights()
    qnn.pack_weights()
    assert same(outputs(qnn, held_out), expected)
    qnn.release_float_weights()
    assert same(outputs(qnn, held_out), expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_only_packed_integers_are_held(bits, calibrated, held_out):
    qnn = calibrated(weight_bits=bits, act_bits=8)
    weights = [layer.weight.numel() for layer in qnn.layers().values()]
    before = held_bytes(qnn)
    qnn.pack_weights()
    expected = before - 5 * sum(weights) + sum(packed_bytes(n, bits) for n in weights)
    assert held_bytes(qnn) == expected
    with qnn.quantized():
        assert held_bytes(qnn) == expected, "weights were dequantized beforehand"
        with torch.no_grad():
            qnn(*held_out)
        assert held_bytes(qnn) == expected


def test_no_network_of_floats_in_passing(calibrated, held_out):
    """One call has the float weight of one layer at a time, give or take a copy of it."""
    qnn = calibrated(weight_bits=4)
    largest = max(layer.weight.numel() for layer in qnn.layers().values())
    qnn.pack_weights()
    assert all(layer.weight.is_meta for layer in qnn.layers().values())
    with qnn.quantized():
        for layer in qnn.layers().values():
            assert layer.weight_dequantized is None
            assert layer.dequantized_weight().numel() <= largest


# ---------------------------------------------------------------------- what needs float weights is an error


def calibrations():
    short = {"iterations": 1, "batch_size": 2}
    return {
        "linear": (lambda qnn, data: linear.calibrate(qnn, data, None, CalibrationRun(show_progress=False))),
        "q-diffusion": lambda qnn, data: qdiffusion.calibrate(
            qnn, data, QDiffusionConfig(**short), CalibrationRun(show_progress=False)
        ),
        "activations": lambda qnn, data: qdiffusion.calibrate(
            qnn, data, QDiffusionConfig(**short), CalibrationRun(weights=False, show_progress=False)
        ),
        "eda-dm": lambda qnn, data: eda_dm.calibrate(
            qnn, data, EdaDmConfig(**short), CalibrationRun(show_progress=False)
        ),
    }


@pytest.mark.parametrize("method", calibrations())
def test_calibration(method, calibrated, data, held_out):
    qnn = calibrated(**W4A8)
    expected = outputs(qnn, held_out)
    qnn.pack_weights()
    with pytest.raises(UserError, match=r"packed.*load it again to calibrate"):
        calibrations()[method](qnn, data)
    assert same(outputs(qnn, held_out), expected)


def test_calibration_of_changes(calibrated, data):
    qnn = calibrated(weight_bits=4, act_bits=8, modulate=True)
    qnn.pack_weights()
    pairs = CalibrationSet(tuple(torch.stack([part, part], dim=1) for part in data.inputs))
    with pytest.raises(UserError, match=r"packed.*load it again to calibrate"):
        modiff.calibrate_changes(qnn, pairs, ChangesConfig(batch_size=2), CalibrationRun(show_progress=False))


def test_float_output(calibrated, held_out):
    qnn = calibrated(**W4A8)
    qnn.pack_weights()
    with pytest.raises(UserError, match="packed"):
        qnn(*held_out)
    with pytest.raises(UserError, match="packed"), qnn.quantized(weights=False):
        qnn(*held_out)


def test_state_dicts(calibrated, wrap):
    qnn, state = calibrated(**W4A8), calibrated(**W4A8).state_dict()
    qnn.pack_weights()
    before = {n: b.clone() for n, b in qnn.named_buffers()}
    packed = qnn.state_dict()
    assert set(packed) == {n.replace("weight_int", "packed.stream") for n in state} - {
        f"model.{n}.weight" for n in qnn.layers()
    }
    other = calibrated(**W4A8)
    other.pack_weights()
    for layer in other.layers().values():
        layer.packed.stream.zero_()
    other.load_state_dict(packed)
    assert all(torch.equal(b, before[n]) for n, b in other.named_buffers())
    with pytest.raises(UserError, match="build it again"):
        qnn.load_state_dict(state)
    with pytest.raises(UserError, match="build it again"):
        qnn.model.load_state_dict({n.removeprefix("model."): v for n, v in state.items()})
    assert all(torch.equal(b, before[n]) for n, b in qnn.named_buffers())


def test_published_files(calibrated, tmp_path):
    qnn = calibrated(**W4A8)
    qnn.pack_weights()
    with pytest.raises(UserError, match=r"packed.*save the native format"):
        save_checkpoint(qnn, tmp_path / "q.pth", format="published")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["native", "published"])
def test_loading_another_checkpoint(format, calibrated, held_out, tmp_path):
    qnn = calibrated(**W4A8)
    save_checkpoint(qnn, tmp_path / "q", format=format)
    expected = outputs(qnn, held_out)
    qnn.pack_weights()
    with pytest.raises(UserError, match="load_packed"):
        load_checkpoint(qnn, tmp_path / "q")
    assert same(outputs(qnn, held_out), expected)


def test_an_uncalibrated_network_keeps_its_weights(wrap, held_out):
    qnn = wrap(**W4A8)
    expected = qnn(*held_out)
    with pytest.raises(UserError, match="weight quantizer"):
        qnn.pack_weights()
    assert torch.equal(qnn(*held_out), expected)


def test_weights_without_a_width(calibrated):
    with pytest.raises(UserError, match="no width and cannot be packed; add --ptq and --weight_bit"):
        calibrated(weight_bits=None, act_bits=8).pack_weights()


# ---------------------------------------------------------------------- the rest of the engine


def test_native_files_are_the_same(calibrated, tmp_path):
    qnn = calibrated(**W4A8)
    save_checkpoint(qnn, tmp_path / "before")
    counts = account(qnn, (1, 8, 8))
    qnn.pack_weights()
    save_checkpoint(qnn, tmp_path / "after")
    assert same_files(tmp_path / "before", tmp_path / "after")
    assert account(qnn, (1, 8, 8)) == counts
    assert content_bytes(tmp_path / "after") == counts.size_bytes


def test_moving_and_copying(calibrated, held_out):
    qnn = calibrated(**W4A8)
    qnn.pack_weights(ALL)
    expected = outputs(qnn, held_out)
    assert qnn.device == torch.device("cpu")
    cache = qnn.layers()["conv_in"].packed.cache
    copied = copy.deepcopy(qnn)
    assert copied.layers()["conv_in"].packed.cache.held == 0 and cache.held > 0
    assert same(outputs(copied, held_out), expected)
    qnn.to("cpu")
    assert cache.held == 0, "weights of another device would stay"
    assert same(outputs(qnn, held_out), expected)
    assert qnn.to("meta").device == torch.device("meta")


# ---------------------------------------------------------------------- loading into packed form


class LargestFloat(TorchDispatchMode):
    """Notes the size of the largest float tensor that appears."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.fixture
def meta_network(tiny_config):
    with torch.device("meta"):
        return Model(tiny_config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_loaded_without_a_float_copy(config, calibrated, meta_network, held_out, tmp_path):
    source = calibrated(**config)
    save_checkpoint(source, tmp_path / "q")
    with LargestFloat() as seen:
        qnn = load_packed(meta_network, tmp_path / "q")
    assert qnn.config == source.config and qnn.device == torch.device("cpu")
    assert same(outputs(qnn, held_out), outputs(source, held_out))
    small = sum(p.numel() for n, p in qnn.named_parameters() if not p.is_meta)
    largest = max(layer.weight.numel() for layer in qnn.layers().values())
    # All small ones come in one piece, which in a network this narrow is no less than its largest layer.
    assert seen.elements <= small < sum(layer.weight.numel() for layer in qnn.layers().values()) / 4
    with LargestFloat() as planted, qnn.quantized():
        qnn.layers()["mid.block_1.conv1"].dequantized_weight()
    assert planted.elements == qnn.layers()["mid.block_1.conv1"].weight.numel() <= largest
    save_checkpoint(qnn, tmp_path / "again")
    assert same_files(tmp_path / "q", tmp_path / "again")


def test_loaded_into_a_network_with_values(calibrated, wrap, tiny_network, held_out, tmp_path):
    source = calibrated(**W4A8)
    save_checkpoint(source, tmp_path / "q")
    with torch.no_grad():
        for parameter in tiny_network.parameters():
            parameter.fill_(0.5)
    assert same(outputs(load_packed(tiny_network, tmp_path / "q"), held_out), outputs(source, held_out))


def test_weights_alone_of_a_file(calibrated, meta_network, held_out, run_quantized, tmp_path):
    source = calibrated(**W4A8)
    save_checkpoint(source, tmp_path / "q")
    qnn = load_packed(meta_network, tmp_path / "q", QuantConfig(**{**W4A8, "act_bits": None}))
    assert torch.equal(run_quantized(qnn, held_out), run_quantized(source, held_out, activations=False))


def test_without_the_ranges_of_a_file(calibrated, meta_network, tmp_path):
    save_checkpoint(calibrated(**W4A8), tmp_path / "q")
    qnn = load_packed(meta_network, tmp_path / "q", activations=False)
    with pytest.raises(UserError, match="activation quantizer"), qnn.quantized():
        pass


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"weight_bits": 8}, "--weight_bit 4"), ({"split_shortcut": False}, "add --split"), ({"act_bits": 6}, "--act_b")],
)
def test_options_must_agree_with_the_file(changes, match, calibrated, meta_network, tmp_path):
    save_checkpoint(calibrated(**W4A8), tmp_path / "q")
    with pytest.raises(UserError, match=match):
        load_packed(meta_network, tmp_path / "q", QuantConfig(**{**W4A8, **changes}))


def test_files_that_cannot_be_loaded_packed(calibrated, meta_network, tmp_path):
    save_checkpoint(calibrated(weight_bits=4), tmp_path / "p.pth", format="published")
    with pytest.raises(UserError, match="published checkpoint, which holds float weights"):
        load_packed(meta_network, tmp_path / "p.pth")
    save_checkpoint(calibrated(weight_bits=None, act_bits=8), tmp_path / "q")
    with pytest.raises(UserError, match="cannot be packed"):
        load_packed(meta_network, tmp_path / "q")


def test_buffers_that_no_file_holds(calibrated, meta_network, tmp_path):
    save_checkpoint(calibrated(weight_bits=4), tmp_path / "q")
    meta_network.register_buffer("schedule", torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match="the buffer schedule is on the meta device"):
        load_packed(meta_network, tmp_path / "q")
