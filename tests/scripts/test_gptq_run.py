"""GPTQ from the command line: a run, what it leaves, its continuation, and the published file."""

from __future__ import annotations

import json

import pytest
import torch
from run_checks import succeeded
from thorough import thorough_except

SCRIPT = "sample_diffusion_ddim"
SAMPLER = ("--timesteps", 2, "--max_images", 1, "--seed", 3)
PTQ = ("--ptq", "--method", "gptq", "--split", "--weight_bit", 4, "--cali_st", 2, "--cali_n", 2)


def manifest(folder):
    return json.loads((folder / "run.json").read_text())


W4A8 = ("--quant_act", "--act_bit", 8)


@pytest.mark.slow
@pytest.mark.parametrize("activations", thorough_except([(), W4A8], W4A8), ids=["W4A32", "W4A8"])
def test_a_run_is_calibrated_and_loaded(activations, call, tiny, tmp_path):
    words = (*tiny.options, *SAMPLER, *PTQ, *activations)
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "run"))
    run = manifest(tmp_path / "run")
    assert run["config"]["method"] == "gptq" and run["config"]["ptq"]["recipe"]["target"] == "corrected"
    assert len(run["reconstruction_errors"]) > 5 and run["estimated_peak_bytes"] > 0
    assert run.get("activation_quantizers", {"silent": []})["silent"] == []
    loaded = (*tiny.options, *SAMPLER, "--ptq", "--split", "--weight_bit", 4, *activations)
    checkpoint = tmp_path / "run" / "quantized.safetensors"
    succeeded(call(SCRIPT, *loaded, "--cali_ckpt", checkpoint, "-l", tmp_path / "loaded"))
    again = manifest(tmp_path / "loaded")
    assert again["noise_error"] == run["noise_error"], "the float network of a loaded run is another"
    assert again["checkpoint_notes"]["method"] == "gptq"


def test_what_it_would_do(call, tiny):
    outcome = call(SCRIPT, *tiny.options, *SAMPLER, *PTQ, "--gptq_target", "gptaq", "--dry-run")
    succeeded(outcome)
    assert json.loads(outcome.out)["ptq"]["recipe"]["target"] == "gptaq"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gptq_damping", -1), "--gptq_damping"),
        (("--gptq_target", "plain", "--gptq_factor", 1), "--gptq_factor has no meaning with --gptq_target plain"),
        (("--weight_start", "gptq"), "--weight_start has no meaning with --method gptq"),
    ],
)
def test_bad_options_are_one_sentence(words, message, call, tiny, tmp_path):
    outcome = call(SCRIPT, *tiny.options, *SAMPLER, *PTQ, *words, "-l", tmp_path / "run")
    assert message in outcome.error_line()
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough  # checkpoint/test_checkpoint: of every method
def test_published_file(call, tiny, tmp_path):
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *PTQ, "-l", tmp_path / "run"))
    from safetensors.torch import load_file

    from ddim.config import load_config
    from ddim.models.diffusion import Model
    from qdiff.checkpoint import load_checkpoint, save_checkpoint
    from qdiff.config import QuantConfig
    from qdiff.quant_model import QuantModel

    def network():
        model = Model(load_config(tiny.config))
        model.load_state_dict(load_file(tiny.weights))
        return QuantModel(model, QuantConfig(4, split_shortcut=True))

    one, other = network(), network()
    load_checkpoint(one, tmp_path / "run" / "quantized.safetensors")
    save_checkpoint(one, tmp_path / "published.pth", "published")
    load_checkpoint(other, tmp_path / "published.pth")
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad(), one.quantized(), other.quantized():
        assert torch.equal(one(*inputs), other(*inputs))
