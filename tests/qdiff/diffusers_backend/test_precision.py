"""Half precision: loaded, calibrated, saved again, and what stays in float32."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from pipelines import ddim, encoded_prompts, flux_without_encoders, images
from torch import nn

import qdiff
from qdiff.calibration.run import CalibrationRun
from qdiff.config import QuantConfig
from qdiff.diffusers_backend.structure import ends_of
from qdiff.functional import quantize
from qdiff.modes import quantized_layers
from qdiff.quantizer import Quantizer
from qdiff.ranges.estimators import estimate

HALF = [torch.float16, torch.bfloat16]
# Relative L2 against float32: half precision moves some activations over a rounding edge; other weights give 1.4.
CLOSE = 0.2


def step_sizes(network):
    return {n: m.delta for n, m in network.named_modules() if isinstance(m, Quantizer)}


def samples(dtype):
    torch.manual_seed(1)
    return {"sample": torch.randn(4, 1, 8, 8).to(dtype), "timestep": torch.tensor([3, 500, 20, 999])}


@torch.no_grad()
def output(network, dtype=torch.float32):
    return network(**samples(dtype), return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_loaded_in_half_precision(dtype, quantized_folder, tmp_path, relative):
    single = diffusers.UNet2DModel.from_pretrained(quantized_folder / "unet")
    half = diffusers.UNet2DModel.from_pretrained(quantized_folder / "unet", dtype=dtype)
    assert half.dtype == dtype and {p.dtype for p in half.parameters()} == {dtype, torch.float32}
    for name, delta in step_sizes(half).items():
        assert delta.dtype == torch.float32 and torch.equal(delta, step_sizes(single)[name])
    for name, layer in quantized_layers(half).items():
        assert layer.quantized_weight().dtype == layer.bias.dtype == dtype
        assert torch.equal(layer.integers(), single.get_submodule(name).integers())
    expected = output(single)
    assert relative(output(half, dtype), expected) < CLOSE < relative(-expected, expected)
    half.save_pretrained(tmp_path)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(output(again, dtype), output(half, dtype))


def test_a_first_layer_without_bias_does_not_hide_the_dtype(quantized_folder):
    """diffusers takes a network's dtype from its first parameter, and pipelines make their latents of it."""
    half = diffusers.UNet2DModel.from_pretrained(quantized_folder / "unet", dtype=torch.float16)
    half.conv_in.bias = None
    assert next(half.parameters()) is half.conv_in.weight_quantizers[0].delta
    assert half.dtype == torch.float16


def test_modules_that_a_class_keeps_in_float32(quantized_folder, monkeypatch):
    monkeypatch.setattr(diffusers.UNet2DModel, "_keep_in_fp32_modules", ["time_embedding", "conv_out"])
    half = diffusers.UNet2DModel.from_pretrained(quantized_folder / "unet", dtype=torch.bfloat16)
    kept = {n for n, layer in quantized_layers(half).items() if layer.quantized_weight().dtype == torch.float32}
    assert kept == {"time_embedding.linear_1", "time_embedding.linear_2", "conv_out"}
    assert all(half.get_submodule(name).bias.dtype == torch.float32 for name in kept)
    embedding = half.time_embedding(torch.randn(2, half.time_embedding.linear_1.weight.shape[1]))
    assert embedding.dtype == torch.float32


def prepared(dtype):
    """Return a pipeline in half precision, its network, a module kept in float32, and how it is called."""
    options = {"samples": 2, "steps": 1, "num_inference_steps": 1}
    if dtype == torch.float16:
        pipe = ddim()
        nn.Module.to(pipe.unet, dtype)  # diffusers' own warns
        return pipe, pipe.unet, nn.Module.to(pipe.unet.conv_norm_out, torch.float32), options
    pipe = flux_without_encoders()  # a pipeline of pixels does not run in bfloat16
    nn.Module.to(pipe.transformer, dtype)
    given = {name: tensor.to(dtype) for name, tensor in encoded_prompts().items()}
    return pipe, pipe.transformer, None, {**options, **given, "height": 32, "width": 32}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_calibrated_in_float32_and_converted_back(dtype):
    pipe, network, kept, options = prepared(dtype)
    seen, first = set(), network.get_submodule(ends_of(network)[0])
    weights = {n: m.weight.float() for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    watch = first.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
    qdiff.quantize_pipeline(pipe, QuantConfig(4, 8), "linear", run=CalibrationRun(show_progress=False), **options)
    watch.remove()
    assert seen == {dtype, torch.float32}, "sampled in half precision, calibrated in float32"
    assert network.dtype == dtype and (kept is None or kept.bias.dtype == torch.float32)
    assert {delta.dtype for delta in step_sizes(network).values()} == {torch.float32}
    for name, layer in quantized_layers(network).items():
        delta, zero_point = estimate(weights[name], 4, "max", False, per_channel=True)
        assert torch.equal(layer.integers(), quantize(weights[name], delta, zero_point, 4).to(torch.uint8))
        assert layer.quantized_weight().dtype == dtype
    assert torch.isfinite(images(pipe, **{n: v for n, v in options.items() if n not in ("samples", "steps")})).all()


def test_a_quantized_pipeline_keeps_its_dtype(quantized_folder):
    pipe = diffusers.DiffusionPipeline.from_pretrained(quantized_folder)
    with pytest.raises(ValueError, match="Casting a quantized model to a new `dtype` is unsupported"):
        pipe.to(torch.float16)
    with pytest.raises(ValueError, match=r"`\.half\(\)` is not supported for quantized model"):
        pipe.unet.half()
