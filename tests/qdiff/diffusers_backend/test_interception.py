"""Errors while a pipeline's loop runs: what diffusers refuses is a sentence, everything else stays what it is."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch
from pipelines import class_conditional

from qdiff.diffusers_backend.pipeline import DiffusersPipeline
from qdiff.errors import UserError


@pytest.fixture
def loaded(tmp_path):
    """``loaded(scheduler, steps)``: a pipeline of classes."""
    class_conditional().save_pretrained(tmp_path)

    def made(scheduler="DDIMScheduler", steps=2):
        pipeline = DiffusersPipeline(tmp_path, scheduler=scheduler, steps=steps, options={"class_labels": [1]})
        pipeline.load(torch.device("cpu"))
        return pipeline

    return made


def test_a_step_that_the_pipeline_cannot_take(loaded):
    pipeline = loaded("KarrasVeScheduler")
    says = r"DiTPipeline does not run with KarrasVeScheduler .* give another --scheduler"
    with pytest.raises(UserError, match=says) as told:
        pipeline.sample(pipeline.network, [0])
    assert isinstance(told.value.__cause__, TypeError)


def test_steps_that_a_scheduler_does_not_divide(loaded):
    with pytest.raises(UserError, match=r"PNDMScheduler and these options .* another number of --steps"):
        loaded("PNDMScheduler", steps=3)


@pytest.mark.parametrize("kind", [TypeError, ValueError, RuntimeError])
def test_errors_of_a_network_are_no_refusals(kind, loaded):
    def broken(*inputs):
        raise kind("planted")

    with pytest.raises(kind, match="planted") as error:
        loaded().sample(broken, [0])
    assert not isinstance(error.value, UserError)
