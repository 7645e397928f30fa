"""``--cache_temporal`` from the command line: the same images, what is counted, and what is refused."""

from __future__ import annotations

import json

import pytest
from run_checks import manifest, succeeded

SCRIPT = "sample_diffusion_ddim"
SAMPLER = ("--max_images", 3, "--batch_size", 2, "--seed", 3, "--timesteps", 4)
W4A8 = ("--ptq", "--split", "--weight_bit", 4, "--quant_act", "--act_bit", 8)
LINEAR = (*W4A8, "--quant_mode", "linear", "--cali_st", 4, "--cali_n", 2)
EMBEDDING = "temb.dense.0"


def images(folder):
    return [path.read_bytes() for path in sorted((folder / "img").iterdir())]


@pytest.mark.slow
def test_images_are_the_same_and_a_run_may_take_it_up(call, tiny, tmp_path):
    words = (*tiny.options, *SAMPLER, *LINEAR, "-l", tmp_path)
    succeeded(call(SCRIPT, *words))
    expected, without = images(tmp_path), manifest(tmp_path)["cost"]
    for path in (tmp_path / "img").iterdir():
        path.unlink()
    succeeded(call(SCRIPT, *words, "--cache_temporal"))
    assert images(tmp_path) == expected and len(expected) == 3
    run = manifest(tmp_path)
    assert run["activation_quantizers"]["silent"] == []
    assert run["cost"]["cached_timesteps"] == 4 and "cached_timesteps" not in without
    assert run["cost"]["bops"] < without["bops"] and run["cost"]["size_bytes"] == without["size_bytes"]


@pytest.mark.slow
def test_in_float_it_is_calibrated_loaded_and_counted(call, tiny, tmp_path):
    in_float = ("--cache_temporal", "float")
    tfmq = (*W4A8, "--method", "tfmq-dm", "--cali_st", 4, "--cali_n", 2, "--cali_iters", 2)
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *tfmq, *in_float, "-l", tmp_path / "run"))
    run, checkpoint = manifest(tmp_path / "run"), tmp_path / "run" / "quantized.safetensors"
    assert run["config"]["ptq"]["quant"]["layer_bits"][EMBEDDING] == "W32A32"
    loaded = (*tiny.options, *SAMPLER, *W4A8, "--act_ranges", "timestep", "--cali_ckpt", checkpoint)
    succeeded(call(SCRIPT, *loaded, *in_float, "--runtime", "torch", "-l", tmp_path / "loaded"))
    assert images(tmp_path / "loaded") == images(tmp_path / "run")
    succeeded(call(SCRIPT, *loaded, "--cache_temporal", "-l", tmp_path / "quantized"))  # the file has these in float
    assert images(tmp_path / "quantized") == images(tmp_path / "run")
    other = call(SCRIPT, *loaded, "--cache_temporal", "--layer_bits", "none", "-l", tmp_path / "other")
    assert "which holds its widths" in other.error_line()
    counted = succeeded(
        call("count_cost", "--config", tiny.config, "--timesteps", 4, *W4A8, "--split", *in_float, "--json")
    )
    cost = json.loads(counted.out)["quantized"]
    assert cost["bops"] == run["cost"]["bops"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cache_temporal", "--runtime", "onnxruntime"), "--cache_temporal contradicts --runtime onnxruntime"),
        (("--cache_temporal", "float", "--runtime", "openvino"), "--cache_temporal contradicts --runtime openvino"),
        (("--cache_temporal", "--quant_mode", "dynamic"), "add --act_scale_per sample, or give --cache_temporal float"),
        (("--cache_temporal", "--modulate"), "--modulate makes the output of temb.dense.0 depend on the steps before"),
        (("--cache_temporal", "float", "--layer_bits", f"{EMBEDDING}=W8"), "leave one of the two out"),
        (("--cache_temporal", "sometimes"), "invalid choice: 'sometimes'"),
    ],
)
def test_bad_options_are_one_sentence(words, message, call, tiny, tmp_path):
    assert message in call(SCRIPT, *tiny.options, *SAMPLER, *W4A8, *words, "-l", tmp_path / "run").error_line()
    assert not (tmp_path / "run").exists()
