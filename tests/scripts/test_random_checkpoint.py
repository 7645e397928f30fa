"""Random checkpoints have the shapes of their config, sample through the ordinary scripts, and need no download."""

from __future__ import annotations

import pytest
from run_checks import image_bytes, manifest, sha256, succeeded
from safetensors.torch import load_file
from script_device import ON_DEVICE

SCRIPT = "random_checkpoint"
SAMPLE = {
    "unconditional": ("sample_diffusion_ldm", ("-n", 2, "-c", 2, "--seed", 1)),
    "class": ("sample_diffusion_ldm_imagenet", ("--n_samples", 2, "--ddim_steps", 2)),
    "text": ("txt2img", ("--prompt", "a three", "--n_samples", 2, "--n_iter", 1, "--ddim_steps", 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLE)
def test_it_samples_like_a_real_one(kind, latent, call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, (script, options) = tmp_path / "random", SAMPLE[kind]
    assert str(folder) in succeeded(call(SCRIPT, "--config", latent(kind).config, "--out", folder)).out
    named = ("-r", folder)
    if kind != "unconditional":
        named = ("--config", folder / "config.yaml", "--ckpt", folder / "model.safetensors")
    succeeded(call(script, *named, *options, *ON_DEVICE, "-l", tmp_path / "run"))
    assert manifest(tmp_path / "run")["status"] == "finished" and len(image_bytes(tmp_path / "run")) == 2
    shapes = {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
    assert shapes == {name: tensor.shape for name, tensor in load_file(latent(kind).weights).items()}


def test_seed_decides(latent, call, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = latent("unconditional").config
        succeeded(call(SCRIPT, "--config", config, "--out", tmp_path / name, "--seed", seed))
    a, b, c = (sha256(tmp_path / name / "model.safetensors") for name in "abc")
    assert a == b != c


def test_bad_input_writes_nothing(call, tmp_path):
    outcome = call(SCRIPT, "--config", tmp_path / "none.yaml", "--out", tmp_path / "out")
    assert outcome.code == 2 and "does not exist" in outcome.error_line()
    assert list(tmp_path.iterdir()) == []
