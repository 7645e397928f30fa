"""TFMQ-DM from the command line: a run, what it leaves, other numbers of steps, and what is refused."""

from __future__ import annotations

import pytest
from run_checks import manifest, succeeded

SCRIPT = "sample_diffusion_ddim"
SAMPLER = ("--max_images", 1, "--seed", 3)
PTQ = ("--ptq", "--split", "--weight_bit", 4, "--quant_act", "--act_bit", 8)
TFMQ = ("--method", "tfmq-dm", "--cali_st", 4, "--cali_n", 2, "--cali_iters", 2, "--tfmq_every", 2)


@pytest.mark.slow
def test_a_run_is_calibrated_and_sampled_with_other_steps(call, tiny, tmp_path):
    words = (*tiny.options, *SAMPLER, "--timesteps", 4, *PTQ, *TFMQ)
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "run"))
    run = manifest(tmp_path / "run")
    assert run["config"]["method"] == "tfmq-dm" and run["config"]["ptq"]["quant"]["act_ranges"] == "timestep"
    assert {"weights temporal", "activations temporal"} <= set(run["reconstruction_errors"])
    assert run["activation_quantizers"]["silent"] == []
    checkpoint = tmp_path / "run" / "quantized.safetensors"
    for steps in (2, 8):
        loaded = (*tiny.options, *SAMPLER, "--timesteps", steps, *PTQ, "--act_ranges", "timestep")
        succeeded(call(SCRIPT, *loaded, "--cali_ckpt", checkpoint, "-l", tmp_path / f"with {steps}"))
        assert manifest(tmp_path / f"with {steps}")["activation_quantizers"]["silent"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "tfmq-dm", "--tfmq_every", 0), "give --tfmq_every at least 1"),
        (("--method", "qdiff", "--tfmq_every", 2), "--tfmq_every has no meaning with --method qdiff"),
        (("--method", "tfmq-dm", "--runtime", "onnxruntime"), "--act_ranges timestep cannot be written as ONNX"),
    ],
)
def test_bad_options_are_one_sentence(words, message, call, tiny, tmp_path):
    outcome = call(SCRIPT, *tiny.options, *SAMPLER, "--timesteps", 4, *PTQ, *words, "-l", tmp_path / "run")
    assert message in outcome.error_line()
    assert not (tmp_path / "run").exists()
