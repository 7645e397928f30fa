"""Faults that would crash, slow down or blacken a run on a GPU, planted: the virtual GPU shows each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuda_checks import assert_sampling_never_waits
from ddim_runs import SCRIPT, W4A8
from run_checks import succeeded
from torch import nn
from virtual_cuda import DeviceMismatch

from ddim.models.diffusion import Model
from ddim.pipeline import DdimPipeline
from qdiff import quantizer
from qdiff.cli import held_out
from qdiff.quantizer import ActQuantizer, Quantizer
from qdiff.sampling import ImageNoise

DATA = ("--cali_st", 2, "--cali_n", 2)
LINEAR = (*W4A8, "--quant_mode", "linear", *DATA)
STEPS = ("--timesteps", 3, "--max_images", 1, "--device", "cuda")
TEXT = ("--prompt", "two", "--n_samples", 1, "--n_iter", 1, "--plms", "--ddim_steps", 2, "--device", "cuda")


@pytest.fixture
def sample(call, one_level, cuda, tmp_path):
    """``sample(*words)`` runs the DDIM script on the device and returns what was counted."""

    def run(*words):
        with cuda.counting() as counts:
            succeeded(call(SCRIPT, *one_level.options, *STEPS, *words, "-l", tmp_path / str(len(words))))
        return counts

    return run


def test_quantizers_that_stay_on_the_cpu(sample, monkeypatch):
    monkeypatch.setattr(Quantizer, "to", lambda self, *_: self)
    with pytest.raises(DeviceMismatch, match=r"is on the CPU|at least two devices"):
        sample(*LINEAR)


def test_single_numbers_that_stay_on_the_cpu(sample, monkeypatch):
    """CUDA takes them along, so that no operation fails: they are found by name."""
    monkeypatch.setattr(ActQuantizer, "_apply", lambda self, *_: self)
    with pytest.raises(DeviceMismatch, match=r"act_quantizer.*is on the CPU"):
        sample(*LINEAR)


def test_a_parameter_that_was_moved_away(sample, monkeypatch):
    moved = DdimPipeline.move_to

    def but_one(self, device):
        moved(self, device)
        self.network.norm_out.weight = nn.Parameter(self.network.norm_out.weight.cpu())

    monkeypatch.setattr(DdimPipeline, "move_to", but_one)
    with pytest.raises(DeviceMismatch, match=r"norm_out.weight is on the CPU"):
        sample()


def test_a_number_read_at_every_step(sample, monkeypatch):
    assert_sampling_never_waits(sample())
    forward = Model.forward

    def reads(self, x, t):
        if not t.is_meta:  # shapes alone are asked for, too
            t[0].item()
        return forward(self, x, t)

    monkeypatch.setattr(Model, "forward", reads)
    with pytest.raises(AssertionError, match=r"item at .*test_cuda_faults.*sample_ddim"):
        assert_sampling_never_waits(sample("--batch_size", 1))


def test_noise_from_pageable_memory(sample, monkeypatch):
    def pageable(self):
        rows = [s.standard_normal(self.shape, dtype=np.float32) for s in self._streams]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    monkeypatch.setattr(ImageNoise, "draw", pageable)
    with pytest.raises(AssertionError, match=r"H2D copy at .*sample_ddim"):
        assert_sampling_never_waits(sample("--eta", 1))


# --- Half precision


@pytest.fixture
def overflowing(monkeypatch):
    """Quantization in the tensor's own half precision, as it once was: 16-bit softmax levels are infinite there."""

    monkeypatch.setattr(held_out, "IMAGES", 1)

    def halved(x, delta, zero_point, bits):
        x = x.half() if torch.is_autocast_enabled("cuda") else x
        q = (x / delta).round_().add_(zero_point).clamp_(0, 2**bits - 1)
        return q.sub_(zero_point).mul_(delta)

    monkeypatch.setattr(quantizer, "fake_quantize_inference", halved)


@pytest.mark.slow
def test_an_overflow_of_half_precision_is_an_error(call, latent, cuda, tmp_path, overflowing):
    words = (*latent("text").options, *TEXT, *LINEAR, "--sm_abit", 16)
    outcome = call("txt2img", *words, "-l", tmp_path / "half")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("error: the ε of the quantized network is nan")
    assert "give --precision full" in outcome.err and not list((tmp_path / "half").glob("img/*.png"))
    calibrated = ("--cali_ckpt", tmp_path / "half" / "quantized.safetensors")
    succeeded(call("txt2img", *words, *calibrated, "--precision", "full", "-l", tmp_path / "full"))


@pytest.mark.thorough  # planted: the error that the test above finds, measured where it is not
def test_an_error_of_eps_in_full_precision_would_not_show_it(call, latent, cuda, tmp_path, overflowing, monkeypatch):
    """As it once was measured; images that are not finite are an error of their own then."""
    measured = held_out._measured

    def in_full_precision(pipeline, qnn):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "precision_name", "full")
            found = measured(pipeline, qnn)
        assert 0 < found["mse"] < found["float_mean_square"]
        return found

    monkeypatch.setattr(held_out, "_measured", in_full_precision)
    outcome = call("txt2img", *latent("text").options, *TEXT, *LINEAR, "--sm_abit", 16, "-l", tmp_path / "half")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("error: image 0 has values that are not finite")
    assert not list((tmp_path / "half").glob("img/*.png"))
