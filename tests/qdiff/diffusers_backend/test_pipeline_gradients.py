"""What a pipeline's own loop ends with, and gradients back through it, against finite differences."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from pipelines import class_conditional, ddim, stable_diffusion

from qdiff.calibration.sensitivity import Operand
from qdiff.calibration.trajectory_sensitivity import trajectory_sensitivities
from qdiff.config import QuantConfig
from qdiff.diffusers_backend.pipeline import DiffusersPipeline
from qdiff.wrapping import layer_places

CLOSE = 0.03  # relative, of a finite difference in float32
KINDS = {
    "pixels": (ddim, "DDIMScheduler", {}),
    "classes": (class_conditional, "DDIMScheduler", {"class_labels": [1, 0], "guidance_scale": 3.0}),
    "text": (stable_diffusion, "DDIMScheduler", {"guidance_scale": 3.0}),
    "several steps": (stable_diffusion, "PNDMScheduler", {"guidance_scale": 3.0}),
    "scaled inputs": (stable_diffusion, "EulerDiscreteScheduler", {"guidance_scale": 1.0}),
    "two calls a step": (stable_diffusion, "HeunDiscreteScheduler", {"guidance_scale": 3.0}),
}


def loaded(folder, make, scheduler, options, steps=3):
    pipe = make()
    changes = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, **changes)
    pipe.save_pretrained(folder)
    prompts = ["a", "b"] if make is stable_diffusion else []
    made = DiffusersPipeline(folder, steps=steps, seed=3, count=2, batch_size=2, prompts=prompts, options=options)
    made.load(torch.device("cpu"))
    made.pipe.set_progress_bar_config(disable=True)
    return made


def latents(pipeline, change=None, factor=0.0):
    """x_0 with a layer's weight moved."""
    name, direction = change or (None, None)
    if name is not None:
        weight = pipeline.network.get_submodule(name).weight
        before = weight.detach().clone()
        weight.data += factor * direction
    with torch.no_grad():
        made = pipeline.sample_latents(pipeline.network, range(2))
    if name is not None:
        weight.data.copy_(before)
    return made


def sensitivities(pipeline, names, images=range(2)):
    given = {Operand.WEIGHTS: names, Operand.ACTIVATIONS: []}
    widths = {Operand.WEIGHTS: (4,), Operand.ACTIVATIONS: ()}
    return trajectory_sensitivities(pipeline, given, widths, QuantConfig(4), images, torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_result(kind, tmp_path, heard_gradients):
    pipeline = loaded(tmp_path, *KINDS[kind])
    if "clip_sample" in pipeline.pipe.scheduler.config:  # a tiny network's x_0 is beyond 1 almost everywhere
        pipeline.pipe.scheduler.register_to_config(clip_sample=False)
    generator = torch.Generator().manual_seed(1)
    names = list(layer_places(pipeline.network))[::7]
    changes = {}
    for name in names:
        weight = pipeline.network.get_submodule(name).weight
        changes[name] = 1e-2 * float(weight.detach().std()) * torch.randn(weight.shape, generator=generator)
    before = copy.deepcopy(pipeline.network.state_dict())
    seen, drawn = heard_gradients
    sensitivities(pipeline, names)
    assert torch.is_grad_enabled()
    told, expected = [], []
    for name, change in changes.items():
        gradient = seen[pipeline.network.get_submodule(name)]
        told.append(0.0 if gradient is None else float((gradient.sum(0) * change.flatten(1)).sum()))
        derivative = (latents(pipeline, (name, change), 1.0) - latents(pipeline, (name, change), -1.0)) / 2
        expected.append(float((drawn[0] * derivative).sum()))
    told, expected = torch.tensor(told), torch.tensor(expected)
    largest = expected.abs().max()
    assert largest > 0 and (told - expected).abs().max() < CLOSE * largest
    assert (1.1 * told - expected).abs().max() > CLOSE * largest  # planted
    assert all(torch.equal(value, before[name]) for name, value in pipeline.network.state_dict().items())


@pytest.mark.slow
def test_the_result_is_the_last_steps(tmp_path):
    pipeline = loaded(tmp_path, *KINDS["text"])
    scheduler = pipeline.pipe.scheduler
    made = latents(pipeline)
    assert pipeline.pipe.scheduler is scheduler and "step" not in vars(scheduler) and made.shape == (2, 4, 8, 8)
    decoded = pipeline.sample(pipeline.network, range(2), calibration=True)
    assert torch.equal(decoded, made)  # a recording does not decode either
    fewer = pipeline.with_steps(2)
    assert (fewer.calls, pipeline.calls) == (2, 3) and fewer.network is pipeline.network
    assert not torch.equal(latents(fewer), made)


@pytest.mark.slow
def test_a_scheduler_keeps_no_gradients(tmp_path):
    """PNDM keeps the outputs of earlier calls."""
    pipeline = loaded(tmp_path, *KINDS["several steps"])
    sensitivities(pipeline, list(layer_places(pipeline.network))[:2])
    copy.deepcopy(pipeline.pipe.scheduler)  # fails for tensors with a graph


@pytest.mark.slow
def test_noise_that_a_scheduler_draws_itself_is_the_same_again(tmp_path):
    pipeline = loaded(tmp_path, class_conditional, "EulerAncestralDiscreteScheduler", {"class_labels": [1, 0]})
    state = torch.random.get_rng_state()
    first = latents(pipeline)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(3)
    assert torch.equal(latents(pipeline), first)


@pytest.mark.slow
def test_batches_may_be_called_in_other_ways(tmp_path):
    """A batch of one image and one of two: each is gone back through as it was called."""
    pipeline = loaded(tmp_path, *KINDS["classes"])
    pipeline.batch_size = 2
    names = list(layer_places(pipeline.network))[:2]
    found = sensitivities(pipeline, names, range(3))[Operand.WEIGHTS]
    assert all(found[name][4] > 0 for name in names)
