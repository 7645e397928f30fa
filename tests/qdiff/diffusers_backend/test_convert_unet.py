"""Quantized UNets in pipeline folders: made from checkpoints, read as checkpoints, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from exact_time import ExactTime
from golden_cases import EXACT_TOLERANCE, GoldenCase
from safetensors.torch import load_file, save_file

from ddim.diffusers_layout import unet_config, unet_layout
from ddim.models.diffusion import Model
from ddim.models.layers import timestep_embedding
from qdiff.calibration.run import CalibrationRun
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.checkpoint.metadata import read_notes
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.io.diffusers_files import component_of
from qdiff.io.files import sha256
from qdiff.methods import linear
from qdiff.quant_model import QuantModel

pytest.importorskip("diffusers")

import diffusers
from golden_diffusers import class_and_arguments, layout_of

from qdiff.diffusers_backend.convert_unet import (
    CheckpointOfUnet,
    UnetOfCheckpoint,
    is_quantized_folder,
    quantized_component,
)
from qdiff.diffusers_backend.quantize import attach
from qdiff.diffusers_backend.structure import mark_concatenations

OPTIONS = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True, "keep_ends": True}
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCALE = "conv_in.weight_quantizers.0.delta"


@pytest.fixture
def qnn(calibrated):
    return calibrated(**OPTIONS)


@pytest.fixture
def arguments(tiny_config, tiny_network):
    """Class, arguments and layout of the tiny network in diffusers."""
    return diffusers.UNet2DModel, unet_config(tiny_config, "x"), unet_layout(tiny_network)


@pytest.fixture
def folder(qnn, arguments, tmp_path):
    """The tiny network, quantized, as a component's folder."""
    quantized_component(qnn, *arguments, "x", {"method": "linear", "seed": 3}).save_pretrained(tmp_path / "p" / "unet")
    return tmp_path / "p" / "unet"


@pytest.fixture
def read(arguments, tiny_config, tmp_path):
    """``read(folder)``: the reader after it read the folder, and the float weights that it returned."""

    def made(folder):
        reader = CheckpointOfUnet(tmp_path / "back" / "model.safetensors")
        with torch.device("meta"):
            network = Model(tiny_config)
        return reader, reader(*arguments, network, folder)

    return made


@pytest.mark.slow
def test_a_folder_becomes_a_checkpoint(qnn, wrap, folder, read, data, run_quantized):
    reader, state = read(folder)
    assert not reader.path.exists()
    reader.save()
    assert reader.path.name == "quantized.safetensors"
    assert read_notes(reader.path) == {"method": "linear", "seed": 3}
    again = wrap(**OPTIONS)
    load_checkpoint(again, reader.path)
    assert torch.equal(run_quantized(again, data.inputs), run_quantized(qnn, data.inputs))
    # What it returned are float weights: those of quantized layers are what the integers stand for.
    weights = {f"{name}.weight": layer.dequantized_weight() for name, layer in qnn.layers().items()}
    expected = {n: weights.get(n, p) for n, p in qnn.model.named_parameters() if "quantizer" not in n}
    assert state.keys() == expected.keys() and all(torch.equal(state[n], value) for n, value in expected.items())


@pytest.mark.slow
def test_half_precision_is_read_as_single(qnn, folder, read):
    """Step sizes are single in any case."""
    network = diffusers.UNet2DModel.from_pretrained(folder, torch_dtype=torch.float16)
    network.save_pretrained(folder)
    stored = load_file(folder / WEIGHTS)
    assert (stored["conv_in.bias"].dtype, stored[SCALE].dtype) == (torch.float16, torch.float32)
    _, state = read(folder)
    assert {value.dtype for value in state.values()} == {torch.float32}
    layer = qnn.layers()["conv_in"]
    assert torch.equal(state["conv_in.bias"], layer.bias.half().float())
    assert torch.equal(state["conv_in.weight"], layer.dequantized_weight())


@pytest.fixture
def quantized_there(tiny_network, arguments, data, tmp_path):
    """``quantized_there(**options)``: the folder of the tiny network, quantized as a network of diffusers."""

    def made(**options):
        kind, config, layout = arguments
        network = component_of(kind, config, layout, tiny_network, "x")
        if options.get("split_shortcut"):
            mark_concatenations(network)
        inputs = [part[:2] for part in data.inputs]
        qnn = QuantModel(network, QuantConfig(**options), inputs, call=lambda n, *given: n(*given).sample)
        linear.calibrate(qnn, data, None, CalibrationRun(show_progress=False))
        attach(network, qnn, {})
        network.save_pretrained(tmp_path / "unet")
        return tmp_path / "unet", network

    return made


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
@torch.no_grad()
def test_networks_that_were_quantized_there(quantized_there, read, wrap, data, run_quantized, relative, split):
    options = {"weight_bits": 4, "act_bits": 8, "split_shortcut": split}
    folder, theirs = quantized_there(**options)
    reader, _ = read(folder)
    reader.save()
    again, inputs = wrap(**options), (data.inputs[0].double(), data.inputs[1])
    load_checkpoint(again, reader.path)
    theirs.double().time_proj = ExactTime(timestep_embedding, again.model.ch)
    expected = theirs(*inputs).sample
    assert relative(run_quantized(again.double(), inputs), expected) < EXACT_TOLERANCE
    assert relative(again(*inputs), expected) > EXACT_TOLERANCE  # planted: the float network


def test_which_folders_are_quantized(folder, arguments, tmp_path):
    assert is_quantized_folder(folder.parent)
    kind, config, _ = arguments
    kind(**config).save_pretrained(tmp_path / "float" / "unet")
    assert not is_quantized_folder(tmp_path / "float") and not is_quantized_folder(tmp_path)


@pytest.mark.slow
def test_checkpoints_of_both_formats(qnn, tiny_network, arguments, tmp_path):
    path = tmp_path / "native.safetensors"
    save_checkpoint(qnn, path, notes={"method": "qdiff", "seed": 1, "samples": 12, "plan": {}})
    unet = UnetOfCheckpoint(qnn.config, path, base_model="tiny")(*arguments, tiny_network, "x")
    expected = {"method": "qdiff", "seed": 1, "calibration": "12 samples", "checkpoint": sha256(path)}
    assert unet.hf_quantizer.quantization_config.notes == expected | {"base_model": "tiny"}
    golden = GoldenCase("ddim_w8_nosplit")
    made = UnetOfCheckpoint(QuantConfig(**golden.options), golden.path)
    unet = made(*class_and_arguments(golden), layout_of(golden.name), golden.network(), "x")
    notes = unet.hf_quantizer.quantization_config.notes
    assert (notes["method"], notes["checkpoint"]) == (f"published checkpoint {golden.path.name}", sha256(golden.path))


def test_checkpoints_that_do_not_fit(tiny_network, arguments, qnn, tmp_path):
    with pytest.raises(UserError, match="opens no trajectory for modulation"):
        UnetOfCheckpoint(QuantConfig(act_bits=8, modulate=True), tmp_path / "missing")
    with pytest.raises(UserError, match="missing does not exist; check the path"):
        UnetOfCheckpoint(qnn.config, tmp_path / "missing")
    save_checkpoint(qnn, tmp_path / "native.safetensors")
    make = UnetOfCheckpoint(QuantConfig(**{**OPTIONS, "weight_bits": 5}), tmp_path / "native.safetensors")
    with pytest.raises(UserError, match="weight_bits 4 but this run has 5; give --weight_bit 4"):
        make(*arguments, tiny_network, "x")


def test_existing_files_are_kept(tmp_path):
    with pytest.raises(UserError, match=r"quantized\.safetensors is where the quantized UNet will be; give another"):
        CheckpointOfUnet(tmp_path / "quantized.safetensors")
    (tmp_path / "quantized.safetensors").touch()
    with pytest.raises(UserError, match=r"quantized\.safetensors exists; choose another folder, or delete it"):
        CheckpointOfUnet(tmp_path / "model.safetensors")


def with_config(**changes):
    """Return a change of the ``quantization_config`` of a folder."""

    def change(folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] |= changes
        path.write_text(json.dumps(config))

    return change


def with_tensors(edit):
    def change(folder):
        state = load_file(folder / WEIGHTS)
        edit(state)
        save_file(state, folder / WEIGHTS)

    return change


DAMAGES = {
    "another method": (with_config(quant_method="torchao"), "has the quantization method torchao; only folders that"),
    "a later version": (with_config(format_version=2), "written in format version 2, and this qdiff reads 1; update"),
    "another type": (with_config(attention=3), r"config\.json is damaged \('int' object is not iterable\); copy the"),
    "float weights": (with_config(weight_bits=None), "leaves all weights in float, which no sampling script can load"),
    "modulation": (with_config(modulate=True), "opens no trajectory for modulation"),
    "another width": (with_config(weight_bits=5), r"of another shape \(e\.g\. .*packed\.stream\)"),
    "another split": (with_config(split_layers=[]), r"tensors .* \(e\.g\. up_blocks.*conv_shortcut"),
    "a missing tensor": (with_tensors(lambda s: s.pop("conv_in.bias")), r"1 tensors missing \(e\.g\. conv_in\.bias\)"),
    "a further tensor": (with_tensors(lambda s: s.update(a=torch.ones(1))), r"1 tensors unexpected \(e\.g\. a\)"),
    "not a number": (with_tensors(lambda s: s[SCALE].fill_(torch.nan)), f"NaN or infinite .*, the first in {SCALE}"),
    "no step": (with_tensors(lambda s: s[SCALE].zero_()), r"the range of conv_in\.weight_quantizers\.0 is missing"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "match"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_folders(folder, read, change, match, tmp_path):
    change(folder)
    with pytest.raises(UserError) as raised:
        read(folder)
    assert re.search(match, str(raised.value)) and "\n" not in str(raised.value)
    assert not (tmp_path / "back").exists()
