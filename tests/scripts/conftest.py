"""Shared by the script tests: commands called in this process, and a tiny model on disk."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ddim_runs import DATA, FEW, SAMPLER, SCRIPT, W4A8
from latent_models import SMALL_UNET, LatentModelFiles, unet_of, write_latent_model
from omegaconf import DictConfig, OmegaConf
from run_checks import succeeded
from safetensors.torch import save_file
from script_device import IS_VIRTUAL, ON_DEVICE

import ddim.pipeline
import ldm.pipeline
from qdiff.cli import held_out, noise_correction

SCRIPTS = Path(__file__).parents[2] / "scripts"

# 8×8, one channel, attention, up and down, wide enough to hear the timestep. β is small: random weights then leave
# most pixels unsaturated, so that equal images say something.
CONFIG = """
data: {dataset: DIGITS, image_size: 8, channels: 1}
model:
  {in_channels: 1, out_ch: 1, ch: 32, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [4], dropout: 0.1,
   ema_rate: 0.9, resamp_with_conv: true}
diffusion: {beta_schedule: linear, beta_start: 0.0001, beta_end: 0.0005, num_diffusion_timesteps: 1000}
training: {batch_size: 600, n_epochs: 10}
sampling: {batch_size: 4}
optim: {lr: 0.001, warmup_steps: 2, weight_decay: 0.0, beta1: 0.9, eps: 1.0e-08, grad_clip: 1.0}
"""
# The fewest layers: where every operation has its price, on the virtual GPU and in what is traced.
ONE_LEVEL = CONFIG.replace("ch_mult: [1, 2]", "ch_mult: [1]").replace("attn_resolutions: [4]", "attn_resolutions: []")


@dataclass(frozen=True)
class Outcome:
    """What a command left on its streams, and its exit code."""

    code: int
    out: str
    err: str

    def error_line(self) -> str:
        """Return the one line on stderr of a command that refused its input."""
        assert self.code == 2, self.err
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


def load_script(name: str):
    """Import scripts/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def device_of_the_scripts():
    """Where ``QDIFF_TEST_DEVICE=virtual``, all script tests run on the virtual GPU."""
    if not IS_VIRTUAL:
        yield
        return
    from virtual_cuda import virtual_cuda  # takes seconds

    with virtual_cuda():
        yield


@pytest.fixture(scope="session", autouse=True)
def few_held_out():
    """The error of ε of two images, not of 16: most of a tiny run's time would be its measurement."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "IMAGES", 2)
        patch.setattr(noise_correction, "HELD_OUT", 2)
        yield


@pytest.fixture(scope="session", autouse=True)
def sizes_checked_once():
    """Every command runs its network on the meta device first: here once for each config, not for each command."""
    with pytest.MonkeyPatch.context() as patch:
        for pipeline in (ddim.pipeline, ldm.pipeline):
            patch.setattr(pipeline, "check_sizes", _once_per_config(pipeline.check_sizes))
        yield


def _once_per_config(check: Callable[..., None]) -> Callable[..., None]:
    passed = set()

    def checked(config: DictConfig, origin: str, *latent: object) -> None:
        sizes = OmegaConf.to_yaml(config), *latent
        if sizes not in passed:
            check(config, origin, *latent)  # an error is not kept
            passed.add(sizes)

    return checked


@pytest.fixture(scope="session")
def call():
    """``call("sample_diffusion_ddim", "--config", …)`` runs the script's main in this process."""

    def run(script: str, *arguments: object) -> Outcome:
        words = [str(a) for a in arguments]
        out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
        sys.argv = [f"scripts/{script}.py", *words]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    load_script(script).main(words)
                except SystemExit as stop:
                    code = stop.code or 0
        finally:
            sys.argv = argv
            log = logging.getLogger("qdiff")
            for handler in list(log.handlers):  # they hold this call's streams and files
                log.removeHandler(handler)
                handler.close()
        return Outcome(code, out.getvalue(), err.getvalue())

    return run


@dataclass(frozen=True)
class TinyModel:
    config: Path
    weights: Path

    @property
    def options(self) -> tuple[object, ...]:
        return "--config", self.config, "--ckpt", self.weights, *ON_DEVICE


def write_tiny_model(folder: Path, config: str) -> TinyModel:
    """Write a config file and safetensors weights of a network with fixed random weights."""
    from ddim.config import load_config
    from ddim.models.diffusion import Model

    (folder / "tiny.yml").write_text(config)
    torch.manual_seed(0)
    network = Model(load_config(folder / "tiny.yml"))
    save_file(network.state_dict(), folder / "tiny.safetensors")
    return TinyModel(folder / "tiny.yml", folder / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyModel:
    """The network of `CONFIG`."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), CONFIG)


@pytest.fixture(scope="session")
def one_level(tmp_path_factory) -> TinyModel:
    """The network of `ONE_LEVEL`."""
    return write_tiny_model(tmp_path_factory.mktemp("one-level"), ONE_LEVEL)


@pytest.fixture(scope="session")
def one_level_wide(tmp_path_factory) -> TinyModel:
    """The same with images of 14×14, which hold 16 windows of SSIM."""
    config = ONE_LEVEL.replace("image_size: 8", "image_size: 14")
    return write_tiny_model(tmp_path_factory.mktemp("one-level-wide"), config)


@pytest.fixture(scope="session")
def latent(tmp_path_factory) -> Callable[[str], LatentModelFiles]:
    """``latent(kind)``: a tiny latent model on disk; see `latent_models.CHANNELS` for the kinds."""
    folder = tmp_path_factory.mktemp("latent")
    return functools.cache(lambda kind: write_latent_model(kind, folder / kind))


@pytest.fixture(scope="session")
def small_latent(tmp_path_factory) -> Callable[[str], LatentModelFiles]:
    """The same with the fewest layers: where every operation has its price, and labels need not change an image."""
    folder = tmp_path_factory.mktemp("small-latent")
    return functools.cache(lambda kind: write_latent_model(kind, folder / kind, unet_of(kind, **SMALL_UNET)))


# --- Runs of the DDIM script; tests that change one copy it first


@pytest.fixture(scope="session")
def ddim_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ddim-ddim_folder")


@pytest.fixture(scope="session")
def float_run(call, tiny, ddim_folder):
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, "--save-npz", "-l", ddim_folder / "float"))
    return ddim_folder / "float"


@pytest.fixture(scope="session")
def linear_run(call, tiny, ddim_folder):
    succeeded(
        call(SCRIPT, *tiny.options, *SAMPLER, *W4A8, *DATA, "--quant_mode", "linear", "-l", ddim_folder / "linear")
    )
    return ddim_folder / "linear"


@pytest.fixture(scope="session")
def calibrated_run(call, tiny, ddim_folder):
    options = (*tiny.options, *SAMPLER, *W4A8, "--a_sym", *FEW)
    succeeded(call(SCRIPT, *options, "--save-npz", "-l", ddim_folder / "w4a8"))
    return ddim_folder / "w4a8", options


@pytest.fixture(scope="session")
def weights_only_run(call, tiny, ddim_folder):
    return _weights_only_run(call, tiny, ddim_folder / "w4")


@pytest.fixture(scope="session")
def small_weights_run(call, one_level, ddim_folder):
    """The same of the model of one level, which is soon exported."""
    return _weights_only_run(call, one_level, ddim_folder / "w4-one-level")


def _weights_only_run(call, model: TinyModel, folder: Path) -> Path:
    options = ("--ptq", "--weight_bit", 4, "--split", *FEW)
    succeeded(call(SCRIPT, *model.options, *SAMPLER, *options, "-l", folder))
    return folder
