"""scripts/export.py: the float network and a calibrated one, and what it refuses."""

from __future__ import annotations

import json
import sys

import pytest
from ddim_runs import DATA, SAMPLER, SCRIPT
from exact_runtimes import require_runtimes
from run_checks import largest_difference, sha256, succeeded

onnx = pytest.importorskip("onnx")
require_runtimes()

GREY_LEVELS = 1


def notes(path) -> dict:
    found = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    return json.loads(found["qdiff_notes"])


@pytest.mark.slow
def test_the_float_network(call, one_level, tmp_path):
    path = tmp_path / "float.onnx"
    outcome = succeeded(call("export", *one_level.options[:4], "--timesteps", 4, "--out", path))
    assert outcome.out == f"{path}: {path.stat().st_size} bytes\n" and notes(path) == {"method": "float"}
    assert one_level.weights.stat().st_size * 0.95 < path.stat().st_size < one_level.weights.stat().st_size * 1.2
    sampling = (*one_level.options, *SAMPLER, "-l")
    succeeded(call(SCRIPT, *sampling, tmp_path / "torch"))
    succeeded(call(SCRIPT, *sampling, tmp_path / "run", "--runtime", "openvino", "--onnx", path))
    assert largest_difference(tmp_path / "run", tmp_path / "torch") <= GREY_LEVELS


@pytest.mark.slow
def test_a_calibrated_network(call, one_level, tmp_path):
    quant = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--split", "--quant_mode", "linear")
    succeeded(call(SCRIPT, *one_level.options, *SAMPLER, *quant, *DATA, "-l", tmp_path / "simulated"))
    checkpoint, path = tmp_path / "simulated" / "quantized.safetensors", tmp_path / "w4a8.onnx"
    words = (*one_level.options[:4], "--timesteps", 4, *quant, "--cali_ckpt", checkpoint)
    succeeded(call("export", *words, "--out", path))
    assert notes(path) == {"checkpoint": sha256(checkpoint)}
    assert path.stat().st_size < 0.6 * one_level.weights.stat().st_size  # the graph weighs more than so few weights
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert kinds.count("QuantizeLinear") > 20
    # Runs, and is not the float network.
    words = (
        *one_level.options,
        *SAMPLER,
        *quant,
        "--cali_ckpt",
        checkpoint,
        "--runtime",
        "onnxruntime",
        "--onnx",
        path,
    )
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "run"))


def test_what_is_not_calibrated_is_refused(call, tiny, tmp_path):
    words = (*tiny.options[:4], "--timesteps", 4, "--out", tmp_path / "model.onnx")
    line = call("export", *words, "--ptq", "--weight_bit", 4).error_line()
    assert "export needs a calibrated checkpoint; give --cali_ckpt PATH" in line
    assert "--out" in call("export", *tiny.options[:4]).error_line()
    line = call("export", *words, "--ptq", "--weight_bit", 4, "--cali_ckpt", tmp_path / "none").error_line()
    assert "none does not exist; check the path" in line
    line = call("export", *words[:-1], tmp_path).error_line()
    assert "cannot be written" in line
    assert not any(tmp_path.iterdir())


def test_one_range_a_channel_is_refused(call, tiny, weights_only_run, tmp_path):
    checkpoint = weights_only_run / "quantized.safetensors"
    quant = ("--ptq", "--weight_bit", 4, "--split", "--quant_act", "--quant_mode", "dynamic", "--resume_w")
    quant += ("--act_scale_per", "channel")
    words = (*tiny.options[:4], "--timesteps", 4, *quant, "--cali_ckpt", checkpoint)
    line = call("export", *words, "--out", tmp_path / "model.onnx").error_line()
    assert "integer products cannot use one range per channel" in line and not any(tmp_path.iterdir())


@pytest.mark.thorough  # test_onnx_modulated: of three layers
def test_both_files_of_a_network_that_modulates_are_named(call, one_level, tmp_path):
    weights = ("--ptq", "--weight_bit", 4, "--split", "--quant_mode", "linear")
    succeeded(call(SCRIPT, *one_level.options, *SAMPLER, *weights, *DATA, "-l", tmp_path / "weights"))
    checkpoint, path = tmp_path / "weights" / "quantized.safetensors", tmp_path / "w4.a4.onnx"
    quant = ("--ptq", "--weight_bit", 4, "--split", "--quant_act", "--act_bit", 4, "--quant_mode", "dynamic")
    words = (*one_level.options[:4], "--timesteps", 4, *quant, "--modulate", "--cali_ckpt", checkpoint)
    outcome = succeeded(call("export", *words, "--out", path))
    both = (tmp_path / "w4.a4.first.onnx", path)
    assert outcome.out == "".join(f"{each}: {each.stat().st_size} bytes\n" for each in both)


def test_without_the_extra(call, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    line = call("export", *tiny.options[:4], "--timesteps", 4, "--out", tmp_path / "model.onnx").error_line()
    assert "onnxscript is not installed; pip install '.[deploy]'" in line
    line = call(SCRIPT, *tiny.options, *SAMPLER, "--runtime", "openvino", "-l", tmp_path / "run").error_line()
    assert "onnxscript is not installed" in line and not any(tmp_path.iterdir())
