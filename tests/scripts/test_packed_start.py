"""With a native checkpoint and a real runtime, the float network is never loaded."""

from __future__ import annotations

import pytest
import torch
from ddim_runs import SAMPLER, SCRIPT
from exact_runtimes import require_runtimes
from latent_models import FEW
from run_checks import image_bytes, largest_difference, manifest, succeeded
from thorough import thorough_except

from ldm import pipeline as ldm_pipeline
from qdiff.quant_model import QuantModel

GREY_LEVELS = 1
TEXT = ("--prompt", "seven", "--n_samples", 2, "--n_iter", 1, "--ddim_steps", 4, "--seed", 7)


@pytest.fixture
def no_float_network(monkeypatch):
    """Fail where a network with float weights is loaded or wrapped; count the packed ones."""
    packed = []

    def forbidden(*_):
        raise AssertionError("the float weights were read")

    monkeypatch.setattr("ddim.pipeline.load_float_weights", forbidden)
    wrap = QuantModel.__init__

    def wrapped(self, network, config):
        assert all(parameter.is_meta for parameter in network.parameters())
        wrap(self, network, config)
        packed.append(self)

    monkeypatch.setattr(QuantModel, "__init__", wrapped)
    return packed


@pytest.mark.parametrize("runtime", thorough_except(("torch", "openvino"), "torch"))
def test_ddim(runtime, call, one_level, small_weights_run, tmp_path, no_float_network):
    if runtime == "openvino":
        require_runtimes()
    checkpoint = small_weights_run / "quantized.safetensors"
    options = (*one_level.options, *SAMPLER, "--ptq", "--weight_bit", 4, "--split", "--cali_ckpt", checkpoint)
    succeeded(call(SCRIPT, *options, "--runtime", runtime, "-l", tmp_path))
    (network,) = no_float_network
    assert network.is_packed and all(layer.weight.is_meta for layer in network.layers().values())
    run = manifest(tmp_path)
    assert run["checkpoint_notes"]["method"] == "qdiff"
    assert list(run["files"]) == ["quantized checkpoint"] and "noise_error" not in run
    assert run["cost"] == manifest(small_weights_run)["cost"]
    if runtime == "torch":
        assert image_bytes(tmp_path) == image_bytes(small_weights_run)
    else:
        assert largest_difference(tmp_path, small_weights_run) <= GREY_LEVELS
    # Planted: simulation reads them.
    with pytest.raises(AssertionError, match="the float weights were read"):
        call(SCRIPT, *options, "-l", tmp_path / "simulated")


@pytest.mark.slow
def test_text_with_first_stage_and_encoder(call, small_latent, tmp_path, monkeypatch):
    options = (*small_latent("text").options, *TEXT, "--ptq", "--weight_bit", 4, "--quant_mode", "linear")
    succeeded(call("txt2img", *options, *FEW, "--outdir", tmp_path / "simulated"))
    loaded, load = [], ldm_pipeline.load_latent_diffusion

    def watched(*args):
        model = load(*args)
        loaded.append({parameter.is_meta for parameter in model.network.parameters()})
        assert not any(parameter.is_meta for parameter in model.first_stage_model.parameters())
        return model

    monkeypatch.setattr(ldm_pipeline, "load_latent_diffusion", watched)
    options += ("--cali_ckpt", tmp_path / "simulated" / "quantized.safetensors")
    for runtime in ("torch", "simulated"):
        succeeded(call("txt2img", *options, "--runtime", runtime, "--outdir", tmp_path / f"{runtime}-loaded"))
    assert loaded == [{True}, {False}]
    assert image_bytes(tmp_path / "torch-loaded") == image_bytes(tmp_path / "simulated-loaded")
    assert torch.is_grad_enabled()
