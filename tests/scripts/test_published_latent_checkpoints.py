"""Calibrated checkpoints of the paper's code, taken by the latent scripts with the options of its README."""

from __future__ import annotations

import pytest
from golden_cases import LDM_CASES, GoldenCase
from latent_models import write_latent_model
from run_checks import image_bytes, manifest, sha256, succeeded
from script_device import ON_DEVICE
from thorough import thorough_except

# case → (kind of model, script, options of its sampler)
RUNS = {
    "bedroom_w4a8": ("unconditional", "sample_diffusion_ldm", ("-n", 2, "-c", 4, "-e", 1.0)),
    "church_w8a8": ("unconditional", "sample_diffusion_ldm", ("-n", 2, "-c", 4, "-e", 0.0)),
    "imagenet_w4a8_split": ("class", "sample_diffusion_ldm_imagenet", ("--n_samples", 2, "--ddim_steps", 4)),
    "sd_w4a8_sm16_split": (
        "text",
        "txt2img",
        ("--prompt", "two", "--plms", "--n_samples", 2, "--n_iter", 1, "--ddim_steps", 4, "--no_grad_ckpt"),
    ),
}


def test_all_cases_are_here():
    assert set(RUNS) == set(LDM_CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_except(RUNS, "bedroom_w4a8", "sd_w4a8_sm16_split"))
def test_with_activations_and_weights_alone(name, call, tmp_path):
    golden, (kind, script, sampler) = GoldenCase(name), RUNS[name]
    files = write_latent_model(kind, tmp_path / "model", golden.case["model"], golden.float_weights())
    model = ("-r", files.weights, *ON_DEVICE) if kind == "unconditional" else files.options
    given = golden.options
    quant = ["--ptq", "--weight_bit", given["weight_bits"], "--cali_ckpt", golden.path]
    quant += ["--split"] if given["split_shortcut"] else []
    act = ["--quant_act", "--act_bit", given["act_bits"], "--sm_abit", given["softmax_bits"]]
    act += ["--a_sym"] if given["act_symmetric"] else []
    made = {}
    for folder, more in (("w", quant), ("wa", quant + act)):
        succeeded(call(script, *model, *sampler, "--seed", 41, *more, "-l", tmp_path / folder))
        run = manifest(tmp_path / folder)
        assert run["files"]["quantized checkpoint"]["sha256"] == sha256(golden.path)
        assert run["activation_quantizers"]["silent"] == []
        assert len(image_bytes(tmp_path / folder)) == 2
        made[folder] = run
    assert (made["w"]["activation_quantizers"]["total"] == 0) and (made["wa"]["activation_quantizers"]["total"] > 0)
    error, with_activations = (made[f]["noise_error"]["mse"] for f in ("w", "wa"))
    assert 0 < error != with_activations < 0.1 * made["wa"]["noise_error"]["float_mean_square"]
