"""scripts/export.py --format: weights for other programs, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from run_checks import succeeded
from safetensors import safe_open
from safetensors.torch import load_file

AS_FLOATS = ("--convolutions", "dequantized", "--linears", "dequantized")


@pytest.fixture
def options(tiny, weights_only_run):
    quant = ("--ptq", "--weight_bit", 4, "--split", "--cali_ckpt", weights_only_run / "quantized.safetensors")
    return (*tiny.options[:4], "--timesteps", 4, *quant)


def test_a_file_for_comfyui(call, tiny, options, tmp_path):
    path = tmp_path / "comfyui.safetensors"
    words = ("--format", "comfyui", *AS_FLOATS, "--compute_dtype", "float32", "--prefix", "model.", "--out", path)
    outcome = succeeded(call("export", *options, *words))
    assert outcome.out == f"{path}: {path.stat().st_size} bytes\n"
    assert "layers are awq_w4a16: their inputs stay in float" in outcome.err
    assert "42 quantized layers are stored as floats, dequantized: temb.dense.0 (32 input channels" in outcome.err
    with safe_open(path, framework="pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert "model.temb.dense.1" in layers  # 128 → 128; the first, of 32 channels, does not fit
    stored, before = load_file(path), load_file(tiny.weights)
    as_integers = {f"{name}.{last}" for name in layers for last in ("weight_scale", "weight_zeros")}
    assert stored.keys() - as_integers == {f"model.{name}" for name in before}
    assert torch.equal(stored["model.norm_out.weight"], before["norm_out.weight"])


def test_layers_that_do_not_fit(call, options, tmp_path):
    line = call("export", *options, "--format", "comfyui", "--out", tmp_path / "net.safetensors").error_line()
    assert "do not fit comfyui: temb.dense.0 (32 input channels, not a multiple of 64); " in line
    assert "conv_in (a convolution); " in line and "; and 39 more; " in line
    assert line.endswith("give --convolutions dequantized and --linears dequantized to store them as floats")
    assert not any(tmp_path.iterdir())


def test_a_network_that_is_not_of_diffusers(call, options, tmp_path):
    line = call("export", *options, "--format", "nunchaku_lite", *AS_FLOATS, "--out", tmp_path / "new").error_line()
    assert "nunchaku_lite is a format of diffusers, and Model is not a model of diffusers" in line
    assert not any(tmp_path.iterdir())


def test_options_that_do_not_go_together(call, tiny, options, tmp_path):
    words = (*tiny.options[:4], "--timesteps", 4, "--out", tmp_path / "net.safetensors", "--format")
    assert "add --ptq and --cali_ckpt PATH" in call("export", *words, "comfyui").error_line()
    line = call("export", *options, "--out", tmp_path / "model.onnx", "--prefix", "model.").error_line()
    assert "--prefix has no effect on ONNX; leave it out, or give another --format" in line
    wrong = ("--format", "nunchaku_lite", "--compute_dtype", "float32", "--out", tmp_path / "new")
    assert "--compute_dtype is float32, which the kernels" in call("export", *options, *wrong).error_line()
    assert not any(tmp_path.iterdir())
