"""Weights rounded to nearest while a float pipeline is loaded, without data."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from components import read_inputs, run
from pipelines import images, quiet
from tiny_models import MODELS, unet

import qdiff
from qdiff.calibration.run import init_weights
from qdiff.config import QuantConfig
from qdiff.diffusers_backend.quantizer import QDiffQuantizer
from qdiff.diffusers_backend.structure import ends_of, mark_concatenations, quantized_layers
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel
from qdiff.weight_forms import WeightForm


def loaded(folder, kind=diffusers.UNet2DModel, **widths):
    return kind.from_pretrained(folder, quantization_config=qdiff.QDiffConfig(**widths))


def rounded(network, call=None, samples=None, **widths):
    """Return a network of the same weights, rounded to nearest by the engine."""
    config = QuantConfig(**widths)
    if config.split_shortcut:
        mark_concatenations(network)
    qnn = QuantModel(network, config, samples, call=call, ends=ends_of(network))
    init_weights(qnn)
    return qnn


WIDTHS = [
    {"weight_bits": 4},
    {"weight_bits": 8, "weight_symmetric": True},
    {"weight_bits": 3, "split_shortcut": True},
    {"weight_bits": 4, "keep_ends": True, "weight_range": "mse"},
    {"weight_bits": 4, "layer_bits": {"conv_in": "W32", "last": "W7"}},
]


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@torch.no_grad()
def test_equals_nearest_rounding(widths, float_folder, tmp_path):
    torch.manual_seed(1)
    given = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    qnn = rounded(diffusers.UNet2DModel.from_pretrained(float_folder / "unet"), **widths)
    with qnn.quantized():
        expected = qnn.model(*given).sample
    network = loaded(float_folder / "unet", **widths)
    assert torch.equal(network(*given).sample, expected)
    for name, layer in qnn.layers().items():
        other = network.get_submodule(name)
        assert len(other.weight_quantizers) == len(layer.weight_quantizers)
        if len(layer.weight_quantizers):
            assert torch.equal(other.integers(), layer.integers())
    network.save_pretrained(tmp_path)
    assert torch.equal(diffusers.UNet2DModel.from_pretrained(tmp_path)(*given).sample, expected)


@pytest.mark.parametrize("name", ["SDXL", "FLUX", "Sana"])
def test_other_networks(name, tmp_path):
    torch.manual_seed(0)
    network = MODELS[name].make()
    call, samples = read_inputs(network, MODELS[name].inputs(2))
    network.save_pretrained(tmp_path)
    with (qnn := rounded(network, call, samples, weight_bits=4)).quantized():
        expected = run(call, qnn.model, samples)
    assert torch.equal(run(call, loaded(tmp_path, type(network), weight_bits=4), samples), expected)


def test_in_a_pipeline(float_folder, tmp_path):
    config = diffusers.PipelineQuantizationConfig(quant_mapping={"unet": qdiff.QDiffConfig(weight_bits=4)})
    pipe = quiet(diffusers.DiffusionPipeline.from_pretrained(float_folder, quantization_config=config))
    assert {layer.form for layer in quantized_layers(pipe.unet).values()} == {WeightForm.PACKED}
    pipe.save_pretrained(tmp_path)
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert torch.equal(images(again), images(pipe))
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 0.5 * sum(
        file.stat().st_size for file in (float_folder / "unet").glob("*.safetensors")
    )


def test_float_weights_are_never_all_in_memory(float_folder, monkeypatch):
    """After each tensor that is loaded, no weight of a quantized layer is a float."""
    held, create = [], QDiffQuantizer.create_quantized_param

    def noting(self, model, value, name, *args, **options):
        create(self, model, value, name, *args, **options)
        layers = quantized_layers(model).values()
        held.append(sum(layer.weight.numel() for layer in layers if not layer.weight.is_meta))

    monkeypatch.setattr(QDiffQuantizer, "create_quantized_param", noting)
    network = loaded(float_folder / "unet", weight_bits=4)
    assert len(held) >= len(quantized_layers(network)) > 20 and set(held) == {0}


@pytest.mark.slow
def test_in_shards(float_folder, tmp_path):
    diffusers.UNet2DModel.from_pretrained(float_folder / "unet").save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    given = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        sharded = loaded(tmp_path, weight_bits=4)(*given).sample
        assert torch.equal(sharded, loaded(float_folder / "unet", weight_bits=4)(*given).sample)


def test_in_half_precision(float_folder):
    config = qdiff.QDiffConfig(weight_bits=4)
    half = diffusers.UNet2DModel.from_pretrained(
        float_folder / "unet", quantization_config=config, dtype=torch.bfloat16
    )
    assert half.dtype == torch.bfloat16 and half.conv_in.weight_quantizers[0].delta.dtype == torch.float32
    with torch.no_grad():
        assert half(torch.randn(2, 1, 8, 8).bfloat16(), torch.tensor([3, 700])).sample.dtype == torch.bfloat16


def test_activations_need_data(float_folder):
    with pytest.raises(UserError, match=r"quantized activations need calibration data; .* qdiff\.quantize_pipeline"):
        loaded(float_folder / "unet", weight_bits=4, act_bits=8)


def test_first_and_last_that_are_not_known(tmp_path):
    class Renamed(diffusers.UNet2DModel):
        def __init__(self, **options):
            super().__init__(**options)
            self.conv_final = self._modules.pop("conv_out")

    Renamed(**{k: v for k, v in unet().config.items() if not k.startswith("_")}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the first and last layer of Renamed are not known; leave out keep_ends"):
        loaded(tmp_path, Renamed, weight_bits=4, keep_ends=True)


def test_a_float_pipeline_after_it_is_float(float_folder):
    loaded(float_folder / "unet", weight_bits=4)
    assert not quantized_layers(diffusers.UNet2DModel.from_pretrained(float_folder / "unet"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_takes_every_shape(bits, tmp_path):
    """Of odd numbers of weights, grouped and not, linear and convolutional."""
    network = diffusers.SanaTransformer2DModel(
        in_channels=3, out_channels=3, num_layers=1, num_attention_heads=1, attention_head_dim=5, sample_size=4,
        num_cross_attention_heads=1, cross_attention_head_dim=5, cross_attention_dim=5, caption_channels=3,
    ).eval()  # fmt: skip
    network.save_pretrained(tmp_path / "float")
    made = loaded(tmp_path / "float", type(network), weight_bits=bits)
    assert any(layer.weight.numel() % 2 for layer in quantized_layers(made).values())
    made.save_pretrained(tmp_path / "quantized")
    again = type(network).from_pretrained(tmp_path / "quantized")
    for name, layer in quantized_layers(made).items():
        assert torch.equal(again.get_submodule(name).integers(), layer.integers())
        assert int(layer.integers().max()) == 2**bits - 1
