"""scripts/convert.py: the bundled models as pipelines of diffusers, which draw the same images, and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bundled_pipelines import COUNT, MODELS
from run_checks import image_bytes, pixels, succeeded
from safetensors.torch import load_file
from script_device import ON_DEVICE
from thorough import thorough_except

from qdiff.io.images import to_uint8

diffusers = pytest.importorskip("diffusers")

GREY_LEVELS = 1
EPS_TOLERANCE = 1e-6  # relative L2, float32


@pytest.fixture(scope="module", params=thorough_except(MODELS, "kl", "text"))
def model(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def folder(model, call, tmp_path_factory):
    """The model as a pipeline's folder."""
    folder = tmp_path_factory.mktemp("convert") / "there"
    outcome = succeeded(call("convert", "--like", model.script, *model.model, "--out", folder))
    assert outcome.out.startswith(f"{folder}: {model.pipeline}, ")
    return folder


@pytest.fixture(scope="module")
def theirs(folder, model):
    import ldm.diffusers_networks as networks

    kind = getattr(networks, model.pipeline, diffusers.DiffusionPipeline)
    pipeline = kind.from_pretrained(folder)
    assert type(pipeline).__name__ == model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours(model):
    return model.pipeline_of_ours()


@pytest.fixture(scope="module")
def our_run(model, call, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    succeeded(call(model.script, *model.model, *model.options, *ON_DEVICE, "-l", run))
    return run


@pytest.mark.slow
def test_the_same_images(model, theirs, our_run):
    def distance() -> int:
        """Return the largest distance of their images from ours, in grey levels."""
        images = to_uint8(model.sample(theirs, model.noise(theirs)))
        return int(np.abs(images.astype(int).reshape(expected.shape) - expected).max())

    expected, scheduler = pixels(our_run), theirs.scheduler
    assert len(expected) == COUNT and distance() <= GREY_LEVELS
    # Planted: timesteps that are five later.
    theirs.scheduler = type(scheduler).from_config(scheduler.config, steps_offset=scheduler.config.steps_offset + 5)
    assert distance() > GREY_LEVELS
    theirs.scheduler = scheduler


@torch.no_grad()
@pytest.mark.parametrize("t", [1, 999])
def test_the_same_noise_in_float32(model, ours, theirs, t):
    context, _ = ours.conditions(range(COUNT), calibration=False)
    inputs = (model.noise(theirs), torch.full((COUNT,), t), *([] if context is None else [context]))
    expected = ours.network(*inputs)
    assert float((theirs.unet(*inputs).sample - expected).norm() / expected.norm()) < EPS_TOLERANCE


@pytest.mark.slow
def test_and_back(model, ours, folder, our_run, call, tmp_path):
    path = tmp_path / "back" / "model.safetensors"
    outcome = succeeded(call("convert", folder, "--to-papers", "--out", path))
    assert outcome.out.startswith(f"{path}: ") and str(path.with_name("config.yaml")) in outcome.out
    state, back = getattr(ours, "model", ours.network).state_dict(), load_file(path)
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())
    succeeded(call(model.script, *model.again(path), *model.options, *ON_DEVICE, "-l", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(our_run)
