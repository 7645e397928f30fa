"""What becomes of a network's structure: concatenations, fused projections, first and last layers, attention."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from components import quantized, read_inputs, run
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from tiny_models import MODELS, dit, flux, sd3, text_unet, unet

from qdiff.calibration.recording import record_features
from qdiff.config import QuantConfig
from qdiff.diffusers_backend.structure import check_rebuilds, ends_of, mark_concatenations, middle_of, quantized_layers
from qdiff.errors import UserError
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.tracing.attention_calls import routed_calls

W4A8 = QuantConfig(4, 8)


def made(name, make=None):
    """Return a network, how it is called, and two samples."""
    torch.manual_seed(0)
    network = (make or MODELS[name].make)()
    return network, *read_inputs(network, MODELS[name].inputs(2))


def concatenations(network, call, samples, monkeypatch):
    """Return the channels of each concatenation of a forward, by the residual block that takes it."""
    found, last, concatenate = {}, [], torch.cat

    def noting(tensors, *args, **options):
        last[:] = [t.shape[1] for t in tensors]
        return concatenate(tensors, *args, **options)

    blocks = [(n, m) for n, m in network.named_modules() if n.startswith("up_blocks") and hasattr(m, "conv1")]
    handles = [
        block.register_forward_pre_hook(lambda *_, name=name: found.__setitem__(name, list(last)))
        for name, block in blocks
    ]
    monkeypatch.setattr(torch, "cat", noting)
    run(call, network, samples)
    monkeypatch.undo()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["DDPM", "LSUN", "SDXL"])
def test_concatenations_are_split_where_they_were_made(name, monkeypatch):
    network, call, samples = made(name)
    expected = concatenations(network, call, samples, monkeypatch)
    mark_concatenations(network)
    QuantModel(network, QuantConfig(4, 8, split_shortcut=True), samples, call=call)
    split = {n: m for n, m in network.named_modules() if isinstance(m, QuantModule) and len(m.slices) == 2}
    assert {n.rpartition(".")[0] for n in split} == set(expected)
    for name, layer in split.items():
        block, _, part = name.rpartition(".")
        assert part == "conv_shortcut" and layer.slices == expected[block]


@pytest.mark.slow
def test_split_layers_are_saved_and_loaded(tmp_path):
    network, call, samples = made("DDPM")
    quantized(network, QuantConfig(4, 8, split_shortcut=True), "linear", None, call, samples)
    assert sum(len(layer.slices) == 2 for layer in quantized_layers(network).values()) == 4
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    assert torch.equal(run(call, loaded, samples), run(call, network, samples))


def test_the_boundary_is_not_the_middle(monkeypatch):
    """So that the test above sees a boundary that is guessed."""
    network, call, samples = made("DDPM")
    assert any(a != b for a, b in concatenations(network, call, samples, monkeypatch).values())


def test_without_the_option_nothing_is_split():
    network, call, samples = made("DDPM")
    qnn = QuantModel(network, W4A8, samples, call=call)
    assert all(len(layer.slices) == 1 for layer in qnn.layers().values())


def test_networks_that_cannot_be_split_are_refused():
    with pytest.raises(UserError, match="DiTTransformer2DModel has no up blocks to split; leave out split_shortcut"):
        mark_concatenations(dit())
    network = unet(up_block_types=("UpBlock2D", "AttnSkipUpBlock2D"), norm_num_groups=4, block_out_channels=(32, 32))
    network.up_blocks[1].resnets = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(UserError, match="up block AttnSkipUpBlock2D cannot be split; quantize it without split"):
        mark_concatenations(network)


FUSED = {"SD 1": ("to_qkv", "to_kv"), "FLUX": ("to_qkv", "to_added_qkv"), "SD3": ("to_qkv", "to_added_qkv")}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUSED)
def test_fused_projections(name, tmp_path, caplog):
    # With dual attention, diffusers' own fused SD3 does not run.
    network, call, samples = made(name, sd3 if name == "SD3" else None)
    in_float = run(call, network, samples)
    network.fuse_qkv_projections()
    assert torch.allclose(run(call, network, samples), in_float, atol=1e-5)
    check_rebuilds(network)
    with caplog.at_level(logging.WARNING, logger="qdiff"):
        qnn = quantized(network, W4A8, "linear", None, call, samples)
    kinds = {n.rpartition(".")[2] for n in qnn.layers()}
    assert kinds >= set(FUSED[name]) and not kinds & {"to_k", "to_v"}
    assert "layers stay in float" in caplog.text and set(qnn.left_in_float.values()) == {"it is never called"}
    assert routed_calls(network), "attention is not quantized"
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    assert torch.equal(run(call, loaded, samples), run(call, network, samples))
    with pytest.raises(UserError, match="the projections of quantized attention stay as they are"):
        loaded.unfuse_qkv_projections()


def test_a_unet_that_was_fused_and_unfused_is_refused():
    """It keeps the fused layers, which a loaded one would not have."""
    network = text_unet()
    network.fuse_qkv_projections()
    network.unfuse_qkv_projections()
    with pytest.raises(
        UserError, match=r"tensors that its config does not describe, e.g. .*to_qkv.weight; load it anew"
    ):
        check_rebuilds(network)
    network = flux()
    network.fuse_qkv_projections()
    network.unfuse_qkv_projections()
    check_rebuilds(network)


def test_a_layer_that_is_never_called_is_reported(caplog):
    class Spare(diffusers.UNet2DModel):
        def __init__(self, **options):
            super().__init__(**options)
            self.spare = torch.nn.Linear(2, 2)

    network = Spare(**dict(unet().config)).eval()
    call, samples = read_inputs(network, MODELS["DDPM"].inputs(2))
    with caplog.at_level(logging.WARNING, logger="qdiff"):
        qnn = QuantModel(network, W4A8, samples, call=call)
    assert qnn.left_in_float == {"spare": "it is never called"}
    assert "1 layers stay in float: spare (it is never called)" in caplog.text


@pytest.mark.parametrize("name", ["DDPM", "SDXL", "DiT", "PixArt", "SD3", "FLUX", "Sana"])
def test_the_first_and_the_last_layer(name):
    """Those that take the samples and give the output, as a forward shows."""
    network, call, samples = made(name)
    taken, order = {}, []

    def note(path, args):
        taken.setdefault(path, args[0])
        order.append(path)

    for path, layer in network.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda _, args, path=path: note(path, args))
    run(call, network, samples)
    first, last = ends_of(network)
    assert torch.equal(taken[first].flatten(1).sort().values, samples[0].flatten(1).sort().values)
    assert last == order[-1]


def test_first_and_last_keep_8_bits(tmp_path):
    network, call, samples = made("DiT")
    quantized(network, QuantConfig(4, 8, keep_ends=True), "linear", None, call, samples)
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    assert (
        loaded.pos_embed.proj.packed.bits == loaded.proj_out_2.packed.bits == 8 and loaded.proj_out_1.packed.bits == 4
    )
    assert len(loaded.proj_out_2.act_quantizers) == 0
    assert torch.equal(run(call, loaded, samples), run(call, network, samples))


@pytest.mark.slow
def test_attention_that_goes_elsewhere_later_is_an_error():
    network, call, samples = made("SD 1")
    quantized(network, W4A8, "linear", None, call, samples)
    network.set_attn_processor(SlicedAttnProcessor(1))  # as pipe.enable_attention_slicing() does
    with pytest.raises(
        UserError, match=r"Attention now makes only 0 of the attention calls .* same attention processor"
    ):
        run(call, network, samples)


def test_attention_of_explicit_products_is_reported(caplog):
    network, call, samples = made("SD 1")
    network.set_attn_processor(AttnProcessor())
    with caplog.at_level(logging.WARNING, logger="qdiff"):
        qnn = QuantModel(network, W4A8, samples, call=call)
    assert (
        set(qnn.left_in_float.values()) == {"it multiplies two activations by itself"} and len(qnn.left_in_float) == 8
    )
    assert "products of 8 modules stay in float: down_blocks.0.attentions.0.transformer_blocks.0.attn1" in caplog.text


@pytest.mark.parametrize("name", ["DDPM", "DiT", "SD3", "FLUX", "Sana"])
def test_the_middle_gives_features_with_channels_first(name):
    """TDAC compares the channel vectors at each position or token."""
    network, call, samples = made(name)
    outputs = []
    block = network.get_submodule(middle_of(network))
    block.register_forward_hook(lambda _, args, out: outputs.append(out if torch.is_tensor(out) else out[-1]))
    (features,) = record_features(lambda *_: run(call, network, samples), network, middle_of(network), range(2))
    if name == "DDPM":
        assert torch.equal(features, outputs[0]) and features.dim() == 4
    else:
        assert torch.equal(features.movedim(1, -1), outputs[0]) and features.dim() == 3


def test_networks_of_another_build_have_no_middle():
    assert middle_of(torch.nn.Sequential(torch.nn.Linear(2, 2))) is None
