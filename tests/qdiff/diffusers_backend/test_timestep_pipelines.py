"""Ranges per timestep in a pipeline: quantized in one call, saved, loaded, and taken at every call of its loop."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch
from diffusers import DiffusionPipeline
from pipelines import ddim, images, quiet

import qdiff
from qdiff.calibration.run import CalibrationRun
from qdiff.errors import UserError

W8A8 = qdiff.QuantConfig(8, 8, act_ranges="timestep")


def quantize(pipe, config=W8A8, **options):
    given = {"samples": 2, "steps": 4, "num_inference_steps": 4, "method": "linear", **options}
    return qdiff.quantize_pipeline(pipe, config, run=CalibrationRun(show_progress=False), **given)


@pytest.mark.slow
def test_quantized_saved_and_loaded(tmp_path):
    pipe = ddim()
    notes = quantize(pipe)
    before = images(pipe)
    assert pipe.unet.hf_quantizer.quantization_config.timesteps == [0, 250, 500, 750]
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert torch.equal(images(loaded), before)
    assert float(notes["noise_error"].split("(")[1].split()[0]) < 0.05
    assert "a range for each of 4 timesteps" in (tmp_path / "unet" / "README.md").read_text()
    deltas = {n: t for n, t in loaded.unet.state_dict().items() if "act_quantizer" in n and n.endswith(".delta")}
    assert deltas and all(t.shape == (4,) for t in deltas.values())
    x = torch.zeros(2, 1, 8, 8)
    planted, at_750 = (loaded.unet(x, t).sample for t in (0, torch.tensor(800)))
    assert torch.equal(at_750, loaded.unet(x, timestep=800).sample) and not torch.equal(at_750, planted)
    with pytest.raises(UserError, match="timestep 1400"):
        loaded.unet(x, 1400)


def test_what_the_calibrated_timesteps_do_not_cover_is_found_before_calibration():
    with pytest.raises(UserError, match=r"timestep 0, .*from 426 to 852"):
        quantize(ddim(), steps=4, num_inference_steps=7)
