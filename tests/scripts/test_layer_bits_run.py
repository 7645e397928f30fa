"""``--layer_bits`` from the command line: a run, what it leaves, its continuation, and other commands on its file."""

from __future__ import annotations

import json

import pytest
import torch
from run_checks import succeeded
from safetensors.torch import save_file

from qdiff.checkpoint.metadata import FORMAT
from qdiff.config import QuantConfig

SCRIPT = "sample_diffusion_ddim"
SAMPLER = ("--timesteps", 2, "--max_images", 1, "--seed", 3)
WIDTHS = ("--split", "--weight_bit", 4, "--quant_act", "--layer_bits", "first=A16,last=W8A16,mid.block_1.conv1=W32")
FEW = ("--cali_st", 2, "--cali_n", 2)
CALIBRATION = ("--method", "gptq", *FEW)


def manifest(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.slow
def test_a_run_is_calibrated_loaded_and_counted(call, tiny, tmp_path):
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, "--ptq", *WIDTHS, *CALIBRATION, "-l", tmp_path / "run"))
    run, checkpoint = manifest(tmp_path / "run"), tmp_path / "run" / "quantized.safetensors"
    assert run["config"]["ptq"]["quant"]["layer_bits"] == {
        "first": "A16",
        "last": "W8A16",
        "mid.block_1.conv1": "W32",
    }
    assert run["activation_quantizers"]["silent"] == []
    (tmp_path / "widths.yaml").write_text("conv_in: A16\nconv_out: W8A16\nmid.block_1.conv1: W32\n")
    words = ("--ptq", "--split", "--weight_bit", 4, "--quant_act", "--layer_bits", tmp_path / "widths.yaml")
    for runtime, given in (("simulated", words), ("torch-int8", words[:-2])):  # the file has its widths
        options = (*tiny.options, *SAMPLER, *given, "--cali_ckpt", checkpoint, "--runtime", runtime)
        succeeded(call(SCRIPT, *options, "-l", tmp_path / runtime))
    assert manifest(tmp_path / "simulated")["noise_error"] == run["noise_error"]
    assert manifest(tmp_path / "torch-int8")["cost"] == run["cost"]
    counted = call("count_cost", "--config", tiny.config, "--timesteps", 2, *words, "--json")
    succeeded(counted)
    assert json.loads(counted.out)["quantized"]["size_bytes"] == run["cost"]["size_bytes"]


@pytest.mark.parametrize(
    ("layer_bits", "says"),
    [
        ("mid.block_1.conv3=W8", "mid.block_1.conv3, which is no layer of Model"),
        ("first=W9", "width is 9"),
        ("nowhere.yaml", "neither a file nor NAME=WIDTHS"),
    ],
)
def test_bad_widths_are_one_sentence(layer_bits, says, call, tiny, tmp_path):
    words = ("--ptq", "--weight_bit", 4, "--layer_bits", layer_bits, *CALIBRATION, "-l", tmp_path / "run")
    assert says in call(SCRIPT, *tiny.options, *SAMPLER, *words).error_line()
    assert not (tmp_path / "run").exists()


def test_widths_of_another_networks_file_are_its_fault(call, tiny, tmp_path):
    config = QuantConfig(weight_bits=4, layer_bits={"mid.block_9.conv1": "W8"})
    save_file(
        {"x": torch.zeros(1)},
        tmp_path / "other.safetensors",
        {"format": FORMAT, "config": json.dumps(config.to_dict())},
    )
    words = ("--ptq", "--weight_bit", 4, "--cali_ckpt", tmp_path / "other.safetensors")
    for script, others in (
        (SCRIPT, (*tiny.options, *SAMPLER, "-l", tmp_path / "run")),
        ("export", (*tiny.options[:4], "--timesteps", 2, "--out", tmp_path / "model.onnx")),
        ("count_cost", (*tiny.options[:2], "--timesteps", 2)),
        ("compare_runtimes", (*tiny.options, "--timesteps", 2, "--images", 1, "--runtimes", "torch")),
    ):
        line = call(script, *others, *words).error_line()
        assert "other.safetensors does not fit this network" in line and "mid.block_9.conv1, which is no layer" in line


def test_a_run_with_other_widths_is_another_run(call, tiny, tmp_path):
    words = (
        *tiny.options,
        *SAMPLER,
        "--ptq",
        "--weight_bit",
        4,
        "--quant_mode",
        "linear",
        *FEW,
        "-l",
        tmp_path / "run",
    )
    succeeded(call(SCRIPT, *words, "--layer_bits", "last=W8"))
    assert "layer_bits" in call(SCRIPT, *words).error_line()
