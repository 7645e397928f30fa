"""What a config says about the network's prediction and its range of images reaches the sampled images."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from omegaconf import OmegaConf
from run_checks import manifest, pixels, succeeded
from script_device import ON_DEVICE

from qdiff.sampling import Parameterization, as_noise_prediction

DDIM, LATENT = "sample_diffusion_ddim", "sample_diffusion_ldm"


@pytest.fixture
def ddim_run(call, tmp_path):
    """``ddim_run(name, **sections)``: pixels of the bundled model with keys changed."""

    def sampled(name, **sections):
        config, run = tmp_path / f"{name}.yml", tmp_path / name
        OmegaConf.save(OmegaConf.merge(OmegaConf.load("configs/digits.yml"), sections), config)
        options = ("--use_pretrained", "--timesteps", 3, "--max_images", 2, "--seed", 1, *ON_DEVICE)
        succeeded(call(DDIM, "--config", config, *options, "--logdir", run))
        return pixels(run).astype(float)

    return sampled


@pytest.mark.slow
def test_ddim_predictions_and_ranges(ddim_run, monkeypatch):
    plain = ddim_run("eps")
    half = ddim_run("plain", data={"rescaled": False})
    # [0, 1] instead of [−1, 1]: the same x_0 shows as 2x − 1.
    expected = np.clip(2.0 * (plain / 127.5 - 1.0) - 1.0, -1.0, 1.0)
    shown = (plain > 0) & (plain < 255)
    assert shown.mean() > 0.1 and np.abs(half / 127.5 - 1.0 - expected)[shown].max() < 0.02
    kinds = []

    def noted(network, schedule, kind):
        kinds.append(kind)
        return as_noise_prediction(network, schedule, kind)

    monkeypatch.setattr("qdiff.sampling.sampler.as_noise_prediction", noted)
    assert not np.array_equal(ddim_run("v", diffusion={"parameterization": "v"}), plain)
    assert set(kinds) == {Parameterization.V}


@pytest.mark.slow
def test_latent_predictions(call, tmp_path):
    made = {}
    for kind in ("eps", "v"):
        folder, run = tmp_path / kind, tmp_path / f"run_{kind}"
        shutil.copytree("models/ldm/digits_vq", folder)
        config = OmegaConf.load(folder / "config.yaml")
        config.model.params.parameterization = kind
        OmegaConf.save(config, folder / "config.yaml")
        options = ("-n", 2, "--custom_steps", 4, "--seed", 1, *ON_DEVICE)
        succeeded(call(LATENT, "-r", folder, *options, "--logdir", run))
        made[kind] = pixels(run)
    assert not np.array_equal(made["eps"], made["v"])
    assert manifest(tmp_path / "run_v")["config"]["model"]["params"]["parameterization"] == "v"


def test_sizes_are_checked_before_weights_are_read(call, tmp_path, monkeypatch):
    config = OmegaConf.load("configs/digits.yml")
    config.data.image_size = 15
    OmegaConf.save(config, tmp_path / "odd.yml")
    monkeypatch.setattr("ddim.pretrained.read_float_tensors", lambda *_: pytest.fail("weights were read"))
    refused = call(DDIM, "--config", tmp_path / "odd.yml", "--use_pretrained", "--timesteps", 3, "--seed", 1)
    assert "give a multiple of 4" in refused.error_line()
