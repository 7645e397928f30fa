"""Our file format: how small it is, that it gives back every bit, and that files of its first version still load."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
import zlib
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from stored_size import content_bytes, stored_bytes
from thorough import thorough_except

from ddim.models.diffusion import Model
from ldm.util import instantiate_from_config
from qdiff.checkpoint import load_checkpoint, load_packed, save_checkpoint
from qdiff.checkpoint import metadata as native_metadata
from qdiff.checkpoint import native as native_format
from qdiff.checkpoint.metadata import FIRST_FORMAT, FORMAT, content_hash, read_metadata
from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.errors import UserError
from qdiff.io.tensor_files import read_float_tensors
from qdiff.kernels.packing import deflate_floats, inflate_floats
from qdiff.quant_model import QuantModel

REPOSITORY = Path(__file__).parents[3]
LATENT = ("digits_class", "digits_kl", "digits_text", "digits_vq")
UNET = "model.diffusion_model."
# What a file may take of the network in float32, scales and header included (issue 7).
LARGEST = {4: 0.14, 8: 0.27}

FIRST = Path(__file__).parents[2] / "golden" / "native_1"
# Relative L2 between machines; the files hold the same integers (hash) and scales.
OUTPUT_TOLERANCE = 2e-3


def bundled(name: str) -> torch.nn.Module:
    """Return the denoising network of a bundled model with its weights; ``cifar10`` has random ones, full size."""
    if name == "cifar10":
        torch.manual_seed(0)
        return Model(OmegaConf.load(REPOSITORY / "configs" / "cifar10.yml"))
    if name == "digits":
        network = Model(OmegaConf.load(REPOSITORY / "configs" / "digits.yml"))
        state = read_float_tensors(REPOSITORY / "models" / "ddim_digits.safetensors")
    else:
        folder = REPOSITORY / "models" / "ldm" / name
        network = instantiate_from_config(OmegaConf.load(folder / "config.yaml").model.params.unet_config)
        state = read_float_tensors(folder / "model.safetensors")
        state = {n.removeprefix(UNET): v for n, v in state.items() if n.startswith(UNET)}
    network.load_state_dict(state)
    return network


def quantized(network: torch.nn.Module, bits: int) -> QuantModel:
    """Nearest rounding, and some range for every activation: split, so that there are as many scales as can be."""
    qnn = QuantModel(network, QuantConfig(weight_bits=bits, act_bits=8, split_shortcut=True))
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)
    for i, quantizer in enumerate(qnn.act_quantizers().values()):
        quantizer.set(torch.tensor(0.01 + 0.001 * i), torch.tensor(i % 256))
    return qnn


@pytest.mark.parametrize("bits", LARGEST)
@pytest.mark.parametrize("name", thorough_except(["digits", *LATENT, "cifar10"], "digits", "digits_text"))
def test_size_of_the_file(name, bits, tmp_path, monkeypatch):
    network = bundled(name)
    floats = 4 * sum(p.numel() for p in network.parameters())
    qnn, path = quantized(network, bits), tmp_path / "q"
    notes = {"method": "q-diffusion", "seed": 1234, "plan": {"some": "choice " * 100}}
    save_checkpoint(qnn, path, notes=notes)
    assert bits / 32 < path.stat().st_size / floats < LARGEST[bits]
    assert path.stat().st_size < content_bytes(path) + 2000 and content_bytes(path) == stored_bytes(qnn)
    if (name, bits) == ("digits_text", 4):  # planted: without deflating, this one is too large
        monkeypatch.setattr(native_format, "deflate_floats", lambda values: values.view(torch.uint8))
        save_checkpoint(qnn, path, notes=notes)
        assert path.stat().st_size / floats > LARGEST[4]


@pytest.mark.slow
def test_every_bit_comes_back(tmp_path):
    """Bundled weights, whose norms and biases have values that a test's random ones lack."""
    qnn, target = quantized(bundled("digits_text"), 4), quantized(bundled("digits_text"), 4)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.fill_(0.5)
    save_checkpoint(qnn, tmp_path / "q")
    load_checkpoint(target, tmp_path / "q")
    state, there = qnn.state_dict(), target.state_dict()
    stored = [n for n in state if n.removesuffix(".weight") not in {f"model.{layer}" for layer in qnn.layers()}]
    assert len(stored) > len(qnn.layers()) * 3
    assert all(torch.equal(state[n], there[n]) for n in stored)


def test_deflated_floats_come_back():
    values = torch.tensor([0.0, -0.0, 1.0, -1e-42, 3e38, float("inf"), 0.1]).repeat(100)
    back = inflate_floats(deflate_floats(values), len(values))
    assert torch.equal(back.view(torch.int32), values.view(torch.int32))  # the signs of zeros too
    assert deflate_floats(values).numel() < values.numel()
    assert inflate_floats(deflate_floats(torch.empty(0)), 0).numel() == 0


@pytest.mark.parametrize("count", [0, 6, 8])
def test_another_number_of_floats_is_refused(count):
    with pytest.raises(ValueError, match=f"not the {count} float values"):
        inflate_floats(deflate_floats(torch.arange(7.0)), count)


def test_damaged_floats_are_refused():
    stream = deflate_floats(torch.arange(7.0))
    for wrong in (stream[:-1], stream[:0]):
        with pytest.raises(ValueError, match="not the 7"):
            inflate_floats(wrong, 7)
    wrong = stream.clone()
    wrong[-1] ^= 1  # of the checksum
    with pytest.raises(zlib.error):
        inflate_floats(wrong, 7)


@pytest.mark.parametrize("place", [0, 5, -1])
def test_a_flipped_bit_of_the_floats_is_noticed(place, wrap, calibrated, tmp_path):
    path = tmp_path / "q"
    save_checkpoint(calibrated(weight_bits=4), path)
    metadata, tensors = read_metadata(path), load_file(path)
    tensors["float"][place] ^= 1
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(wrap(weight_bits=4), path)


# ---------------------------------------------------------------------- files of the first version


@pytest.fixture
def first():
    """The case, a network for it with other weights, and its golden values."""
    case = json.loads((FIRST / "case.json").read_text())
    torch.manual_seed(1)
    network = Model(OmegaConf.create(case["network"])).eval()
    return case, network, torch.load(FIRST / "golden.pth", weights_only=True)


def integers_hash(qnn: QuantModel) -> str:
    return hashlib.sha256(b"".join(m.integers().numpy().tobytes() for _, m in sorted(qnn.layers().items()))).hexdigest()


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_the_first_version(packed, first, run_quantized, relative):
    case, network, golden = first
    path = FIRST / "quantized.safetensors"
    assert read_metadata(path)["format"] == FIRST_FORMAT
    if packed:
        qnn = load_packed(network, path)
        assert qnn.config == QuantConfig(**case["quant"])
    else:
        qnn = QuantModel(network, QuantConfig(**case["quant"]))
        load_checkpoint(qnn, path)
    assert integers_hash(qnn) == case["weight_int_sha256"]
    assert relative(run_quantized(qnn, (golden["x"], golden["t"])), golden["out"]) < OUTPUT_TOLERANCE
    with torch.no_grad():
        qnn.model.mid.attn_1.v.weight_quantizers[0].zero_point.add_(1)
    assert relative(run_quantized(qnn, (golden["x"], golden["t"])), golden["out"]) > OUTPUT_TOLERANCE


def test_a_file_of_the_first_version_is_written_anew(first, run_quantized, tmp_path):
    case, network, golden = first
    old, new = QuantModel(network, QuantConfig(**case["quant"])), tmp_path / "q"
    load_checkpoint(old, FIRST / "quantized.safetensors")
    save_checkpoint(old, new, notes=case["notes"])
    assert read_metadata(new)["format"] == FORMAT
    again = QuantModel(Model(OmegaConf.create(case["network"])), QuantConfig(**case["quant"]))
    load_checkpoint(again, new)
    given = golden["x"], golden["t"]
    assert torch.equal(run_quantized(again, given), run_quantized(old, given))
    assert content_bytes(new) == account(old, (1, 8, 8)).size_bytes
    # The first version took a whole byte for a zero point of 2 bits, and more header.
    assert content_bytes(new) < content_bytes(FIRST / "quantized.safetensors")
    assert new.stat().st_size < 0.95 * (FIRST / "quantized.safetensors").stat().st_size


@pytest.mark.parametrize("tensor", ["float", "weight_zero_point", "conv_in.weight"])
@pytest.mark.parametrize("how", ["missing", "short"])
def test_a_damaged_file_of_the_first_version(tensor, how, first, tmp_path):
    case, network, _ = first
    source, path = FIRST / "quantized.safetensors", tmp_path / "q"
    tensors = load_file(source)
    value = tensors.pop(tensor)
    if how == "short":
        tensors[tensor] = value[:-1].clone()
    save_file(tensors, path, metadata=read_metadata(source))
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(QuantModel(network, QuantConfig(**case["quant"])), path)


def test_a_later_version_is_refused(wrap, calibrated, tmp_path):
    path = tmp_path / "q"
    save_checkpoint(calibrated(weight_bits=4), path)
    save_file(load_file(path), path, metadata={**read_metadata(path), "format": "qdiff-4"})
    with pytest.raises(UserError, match=r"format qdiff-4, not qdiff-2"):
        load_checkpoint(wrap(weight_bits=4), path)


# ---------------------------------------------------------------------- checksum


def flipped(source: Path, path: Path, place: int, mask: int) -> None:
    content = bytearray(source.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_a_flipped_byte_is_found(packed, wrap, calibrated, tiny_network, tmp_path):
    """In any tensor; the header's own bytes are found by other checks, or by this one of the metadata's texts."""
    good, bad, source = tmp_path / "good", tmp_path / "bad", random.Random(0)
    save_checkpoint(calibrated(weight_bits=4, act_bits=8), good, notes={"method": "q-diffusion"})
    content = good.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    places = [source.randrange(begin, len(content)) for _ in range(30)]
    header = content.index(b'"notes"')
    places += [begin, len(content) - 1, header + 25, content.index(b"act_bits") + 11, content.index(b'"layout"') + 12]
    qnn = wrap(weight_bits=4, act_bits=8)
    for place in places:
        flipped(good, bad, place, 1 << source.randrange(3))
        with pytest.raises(UserError, match=r"damaged|--act_bit|another network|no native quantized") as caught:
            if packed:
                load_packed(copy.deepcopy(tiny_network), bad, qnn.config)
            else:
                load_checkpoint(qnn, bad)
        assert "\n" not in str(caught.value)
        if place >= begin:
            assert re.search(r"the checksum of \w+ does not match", str(caught.value))
    load_checkpoint(qnn, good)


@pytest.mark.slow
def test_any_byte_of_the_header(wrap, calibrated, tmp_path):
    """Each loads what was written, or is one sentence."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    source = calibrated(weight_bits=4, act_bits=8)
    save_checkpoint(source, good, notes={"method": "q-diffusion"})
    size, qnn, loaded = 8 + int.from_bytes(good.read_bytes()[:8], "little"), wrap(weight_bits=4, act_bits=8), []
    for place in range(0, size, 3):
        flipped(good, bad, place, 2)
        try:
            load_checkpoint(qnn, bad)
            loaded.append(place)
            assert native_format.content_hash(qnn) == native_format.content_hash(source)
        except UserError as error:
            assert "\n" not in str(error)
    assert len(loaded) < 20  # the word "checksum" itself, or what is no part of a text


def test_files_without_a_checksum_load_unchecked(wrap, calibrated, tmp_path):
    path = tmp_path / "q"
    save_checkpoint(calibrated(weight_bits=4), path)
    metadata, tensors = read_metadata(path), load_file(path)
    tensors["weight"][3] ^= 1
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match="the checksum of weight does not match"):
        load_checkpoint(wrap(weight_bits=4), path)
    del metadata["checksum"]
    save_file(tensors, path, metadata=metadata)
    load_checkpoint(wrap(weight_bits=4), path)  # as before: one weight of another value, and nobody knows


def test_the_checksum_copies_nothing(calibrated, monkeypatch):
    seen = []
    monkeypatch.setattr(native_metadata.zlib, "crc32", lambda data, value=0: seen.append(data) or 0)
    tensor = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    native_metadata.checksum({"a": tensor}, {})
    assert any(getattr(data, "ctypes", None) and data.ctypes.data == tensor.data_ptr() for data in seen)


@pytest.mark.slow
def test_the_hash_of_the_content(calibrated, tmp_path):
    """Two files of one calibration are the same, in whatever order safetensors wrote their metadata."""
    qnn, notes = calibrated(weight_bits=4), {"seed": 1}
    for name in "abcd":
        save_checkpoint(qnn, tmp_path / name, notes=notes)
    assert len({content_hash(tmp_path / name) for name in "abcd"}) == 1
    save_checkpoint(qnn, tmp_path / "b", notes={"seed": 2})
    save_checkpoint(calibrated(weight_bits=3), tmp_path / "c", notes=notes)
    save_checkpoint(qnn, tmp_path / "d", "published")
    assert len({content_hash(tmp_path / name) for name in "abcd"}) == 4
    with pytest.raises(UserError, match="does not exist"):
        content_hash(tmp_path / "none")
