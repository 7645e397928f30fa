"""Quantized networks of the papers as quantized networks of diffusers: the same ε to the last digits, and back."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from golden_cases import ALL_CASES, EXACT_TOLERANCE, GoldenCase
from torch import Tensor, nn

from ldm.config import load_config
from ldm.diffusers_layout import unet_layout
from ldm.diffusers_unet import diffusers_class, unet_config
from ldm.util import instantiate_from_config
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.checkpoint.metadata import read_metadata
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.interface import split_input
from qdiff.io.tensor_files import read_safetensors
from qdiff.io.tensor_layout import NetworkLayout
from qdiff.methods import linear
from qdiff.quant_attention import QuantAttention
from qdiff.quant_model import QuantModel
from qdiff.quantizer import Quantizer

pytest.importorskip("diffusers")

from golden_diffusers import class_and_arguments, in_double, layout_of

from qdiff.diffusers_backend import convert_state
from qdiff.diffusers_backend.config import QDiffConfig
from qdiff.diffusers_backend.convert_state import quantization_of, to_ours, to_theirs
from qdiff.diffusers_backend.convert_unet import quantized_component
from qdiff.diffusers_backend.structure import mark_split_layers, quantized_layers, replace_layers

ALL = pytest.mark.parametrize("name", ALL_CASES)
# What is planted in a step size: of a weight, and of an activation, whose rounding hides smaller errors.
TINY_ERROR, STEP_ERROR = 1 + 1e-7, 1.001


@cache
def published(name: str) -> tuple[GoldenCase, QuantModel]:
    """Return a case and its network, filled from the published file (not to be changed)."""
    golden = GoldenCase(name)
    qnn = golden.wrapped()
    load_checkpoint(qnn, golden.path)
    return golden, qnn


@cache
def converted(name: str) -> nn.Module:
    """Return the case's network as diffusers' (not to be changed)."""
    golden, qnn = published(name)
    return quantized_component(qnn, *class_and_arguments(golden), layout_of(name), name)


@torch.no_grad()
def predicted(theirs: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return theirs(*inputs).sample


def empty(golden: GoldenCase, config: QDiffConfig) -> nn.Module:
    """Return diffusers' network with quantized layers without values."""
    kind, arguments = class_and_arguments(golden)
    with torch.device("meta"):
        made = kind(**arguments)
    replace_layers(made, config)
    return made


def ours_without_values(golden: GoldenCase, config: QuantConfig) -> QuantModel:
    with torch.device("meta"):
        network = golden.network()
    return QuantModel(network, config)


# --- to diffusers


@pytest.mark.slow
@ALL
def test_published_outputs(name, relative):
    golden, _ = published(name)
    expected, theirs = golden.values["resumed"], in_double(golden, copy.deepcopy(converted(name)))
    assert relative(predicted(theirs, golden.exact_inputs), expected) < EXACT_TOLERANCE
    # Planted: a tiny error in the last layer's weight, and one in its input's step size.
    layer = list(quantized_layers(theirs).values())[-1]
    for quantizers, error in ((layer.weight_quantizers, TINY_ERROR), (layer.act_quantizers, STEP_ERROR)):
        if len(quantizers):
            quantizers[0].delta.mul_(error)
            assert relative(predicted(theirs, golden.exact_inputs), expected) > EXACT_TOLERANCE
            quantizers[0].delta.div_(error)


@pytest.mark.slow
@ALL
def test_saved_and_loaded_by_diffusers(name, tmp_path):
    golden, theirs = published(name)[0], converted(name)
    theirs.save_pretrained(tmp_path)
    again = type(theirs).from_pretrained(tmp_path)
    assert torch.equal(predicted(again, golden.inputs), predicted(theirs, golden.inputs))
    assert again.hf_quantizer.quantization_config.to_dict() == theirs.hf_quantizer.quantization_config.to_dict()


RELEASED = (
    "latent-diffusion/lsun_bedrooms-ldm-vq-4",
    "latent-diffusion/lsun_churches-ldm-kl-8",
    "stable-diffusion/v1-inference",
)
# Options of other methods on the cases' float networks: EDA-DM's, MoDiff's without modulation, and what is left.
METHODS = {
    "fused qkv, 8-bit ends": ("bedroom_w4a8", {"weight_bits": 3, "act_bits": 4, "keep_ends": True}),
    "split, 8-bit ends": (
        "imagenet_w4a8_split",
        {"act_bits": 6, "keep_ends": True, "act_symmetric": True, "split_shortcut": True},
    ),
    "symmetric weights": ("church_w8a8", {"weight_symmetric": True, "act_bits": 8}),
    "ends of their own": (
        "imagenet_w4a8_split",
        {"weight_bits": 4, "act_bits": 8, "split_shortcut": True, "layer_bits": {"first": "W32A16", "last": "W7A32"}},
    ),
    "finer step sizes of channels": (
        "imagenet_w4a8_split",
        {"act_bits": 6, "split_shortcut": True, "power_of_two_scales": True},
    ),
    "float weights": ("church_w8a8", {"weight_bits": None, "act_bits": 8}),
    "dynamic": ("sd_w4a8_sm16_split", {"act_bits": 8, "act_dynamic": True, "act_scale_per": "sample", "rest_bits": 6}),
    "dynamic, float attention": ("bedroom_w4a8", {"act_bits": 8, "act_dynamic": True, "act_scale_per": "channel"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), METHODS.values(), ids=METHODS)
def test_other_methods(name, options, relative, run_quantized, tmp_path):
    golden = GoldenCase(name)
    network = golden.network()
    network.load_state_dict(golden.float_weights())
    qnn = QuantModel(network, QuantConfig(**options))
    linear.calibrate(qnn, CalibrationSet(golden.inputs), None, CalibrationRun(show_progress=False))
    for layer in list(qnn.layers().values())[::2]:
        if layer.bias is not None:
            layer.set_quantized_bias(layer.bias + 0.01)
    theirs = quantized_component(qnn, *class_and_arguments(golden), layout_of(name), name)
    assert native(back(golden, theirs, qnn.config), tmp_path) == native(qnn, tmp_path)
    expected = run_quantized(qnn.double(), golden.exact_inputs)
    assert relative(predicted(in_double(golden, theirs), golden.exact_inputs), expected) < EXACT_TOLERANCE
    # Planted: the float network.
    assert relative(qnn(*golden.exact_inputs), expected) > EXACT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_released_networks(name):
    """On the meta device, every layer, attention and quantizer of the big networks has its partner."""
    section = load_config(f"configs/{name}.yaml").model.params.unet_config
    kind, arguments = unet_config(section.params, 64, name)
    with torch.device("meta"):
        network = instantiate_from_config(section)
    layout, options = unet_layout(network), {"act_bits": 8, "split_shortcut": True, "keep_ends": True}
    qnn = QuantModel(network, QuantConfig(**options))
    for module in qnn.modules():
        if isinstance(module, Quantizer):
            module.initialised.fill_(True)
    theirs = quantized_component(qnn, diffusers_class(kind), arguments, layout, name)
    assert len(quantized_layers(theirs)) == sum(len(p.theirs) for p in layout.layers if p.ours in qnn.layers())
    assert sum(isinstance(m, QuantAttention) for m in theirs.modules()) == len(layout.attentions)


# --- and back


def native(qnn: QuantModel, folder) -> dict[str, str | bytes]:
    """Return the contents of a network's native checkpoint, which are all its values, and how it is quantized."""
    path = folder / "native.safetensors"
    save_checkpoint(qnn, path)
    return read_metadata(path) | {name: tensor.numpy().tobytes() for name, tensor in read_safetensors(path).items()}


def back(golden: GoldenCase, theirs: nn.Module, config: QuantConfig) -> QuantModel:
    """Return diffusers' network as ours."""
    again = ours_without_values(golden, config)
    to_ours(theirs, layout_of(golden.name), again, "x")
    return again


@pytest.mark.slow
@ALL
def test_the_same_checkpoint_comes_back(name, tmp_path):
    golden, qnn = published(name)
    theirs, expected = copy.deepcopy(converted(name)), native(qnn, tmp_path)
    assert native(back(golden, theirs, qnn.config), tmp_path) == expected
    # Planted: another integer.
    list(quantized_layers(theirs).values())[-1].packed.stream[0] ^= 1
    wrong = native(back(golden, theirs, qnn.config), tmp_path)
    assert {key for key in expected if wrong[key] != expected[key]} == {"weight", "checksum"}


def test_layers_with_other_names_are_refused():
    golden = GoldenCase("bedroom_w4a8")
    config = QuantConfig(4, layer_bits={"last": "W8", "input_blocks.0.0": "W8"})
    qnn = ours_without_values(golden, config)
    with pytest.raises(UserError, match=r"--layer_bits names input_blocks\.0\.0, which has another name"):
        quantized_component(qnn, *class_and_arguments(golden), layout_of(golden.name), "x")


def test_a_fused_layer_needs_one_range():
    golden, qnn = published("bedroom_w4a8")
    theirs = copy.deepcopy(converted(golden.name))
    theirs.mid_block.attentions[0].to_k.act_quantizers[0].delta.mul_(2)
    with pytest.raises(UserError, match=r"x has different ranges for .*to_k\.act_quantizers\.0 and .* the one middle_"):
        back(golden, theirs, qnn.config)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.delta.zero_(),
        lambda q: q.delta.fill_(torch.nan),
        lambda q: q.zero_point.fill_(16),
        lambda q: q.zero_point.fill_(-1),
        lambda q: q.initialised.fill_(False),
    ],
)
def test_damaged_ranges(change):
    golden, qnn = published("ddim_w4a8_split")
    theirs = copy.deepcopy(converted(golden.name))
    change(theirs.conv_in.weight_quantizers[0])
    with pytest.raises(UserError, match=r"x is damaged: the range of conv_in\.weight_quantizers\.0 is missing"):
        back(golden, theirs, qnn.config)


# --- what is refused


def test_modulation():
    golden = GoldenCase("ddim_w8_nosplit")
    qnn = golden.wrapped(act_bits=8, modulate=True, act_dynamic=True)
    with pytest.raises(UserError, match=r"opens no trajectory for modulation; give a checkpoint .* without --modulate"):
        quantization_of(qnn, layout_of(golden.name), {})


def test_missing_ranges():
    golden = GoldenCase("ddim_w8_nosplit")
    qnn = golden.wrapped()
    theirs = empty(golden, quantization_of(qnn, layout_of(golden.name), {}))
    with pytest.raises(UserError, match="has no range; calibrate the network or load a checkpoint first"):
        to_theirs(qnn, layout_of(golden.name), theirs, "x")


SPLIT, FUSED = "ddim_w4a8_split", "bedroom_w4a8"
OTHERS = {
    "a layer is not split": (SPLIT, {"split_layers": []}, r"conv_shortcut with .* \[8\] for the input of \[64\] chann"),
    "a layer in float": (SPLIT, {"left_in_float": {"conv_out": "x"}}, "x has conv_out with no quantization, where con"),
    "other ends": (
        SPLIT,
        {"keep_ends": True},
        r"conv_in with \[8\] bits for the weight and \[8\] .*, where conv_in ",
    ),
    "attention in float": (
        SPLIT,
        {"attention": {}},
        r"attention_core_0 with no quantization, where .*attn\.0\.core ",
    ),
    "scaled afterwards": (FUSED, {"prescaled": []}, "scaled after they are quantized, where .* are scaled before"),
}


@pytest.mark.parametrize(("name", "changes", "match"), OTHERS.values(), ids=OTHERS)
def test_networks_that_are_quantized_in_another_way(name, changes, match):
    golden, qnn = published(name)
    config = quantization_of(qnn, layout_of(name), {})
    theirs = empty(golden, QDiffConfig.from_dict({**config.to_dict(), **changes}))
    with pytest.raises(UserError, match=f"{match}.*; only networks that are quantized as the papers' code does"):
        to_theirs(qnn, layout_of(name), theirs, "x")
    assert all(layer.packed is None for layer in quantized_layers(theirs).values())


def test_a_boundary_elsewhere(monkeypatch):
    golden, qnn = published(SPLIT)
    config = quantization_of(qnn, layout_of(SPLIT), {})

    def one_channel_later(network: nn.Module, names: list[str]) -> None:
        mark_split_layers(network, names)
        for name in names:
            split_input(network.get_submodule(name), network.get_submodule(name).split_at + 1)

    monkeypatch.setattr("qdiff.diffusers_backend.structure.mark_split_layers", one_channel_later)
    with pytest.raises(UserError, match=r"conv_shortcut with .*of \[33, 31\] channels, where up\..* of \[32, 32\] "):
        to_theirs(qnn, layout_of(SPLIT), empty(golden, config), "x")


def test_every_quantizer_has_a_partner(monkeypatch):
    golden, qnn = published(FUSED)
    theirs, layout = empty(golden, quantization_of(qnn, layout_of(FUSED), {})), layout_of(FUSED)
    without = NetworkLayout(layout.layers, dict(list(layout.attentions.items())[1:]))
    with pytest.raises(UserError, match=r"x has no partner for the quantizer .*act_quantizer_k in the other network"):
        to_theirs(qnn, without, theirs, "x")
    # Without that check, the values themselves show that a layer is missing.
    monkeypatch.setattr(convert_state, "_partners", lambda *_: {})
    without = NetworkLayout(tuple(p for p in layout.layers if p.ours != "out.2"), layout.attentions)
    with pytest.raises(UserError, match=r"x has no tensor for conv_out\.bias of diffusers' network"):
        to_theirs(qnn, without, theirs, "x")


def test_only_concatenations_are_split():
    golden, _ = published(SPLIT)
    with pytest.raises(UserError, match="conv_in of UNet2DModel takes no concatenation, but its quantization_config"):
        empty(golden, QDiffConfig(split_shortcut=True, split_layers=["conv_in"]))
