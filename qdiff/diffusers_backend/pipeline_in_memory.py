"""A pipeline that is loaded already, as the `Pipeline` by whose results widths are chosen."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from qdiff.diffusers_backend.folder import calls_of, training_steps_of
from qdiff.diffusers_backend.module import Denoiser
from qdiff.diffusers_backend.pipeline import DiffusersPipeline, Loop
from qdiff.pipeline import Pipeline

STEPS = "num_inference_steps"


class PipelineInMemory(DiffusersPipeline):
    """A ``DiffusionPipeline`` object in the place of a folder.

    Args:
        pipe: the pipeline; nothing of it changes.
        component, network: name and module of what is quantized.
        seed: the noise of image i depends only on (seed, i).
        batch_size: images per batch.
        prompts: used in turn; for text pipelines.
        options: further keywords of the pipeline's call.
    """

    def __init__(
        self,
        pipe: Any,
        component: str,
        network: nn.Module,
        seed: int,
        batch_size: int,
        prompts: Sequence[str] | None,
        options: Mapping[str, Any],
    ) -> None:
        self.pipe, self.component, self.prompts, self.options = pipe, component, list(prompts or ()), dict(options)
        parameters, scheduler = inspect.signature(type(pipe).__call__).parameters, copy.deepcopy(pipe.scheduler)
        if STEPS in parameters:
            self.options.setdefault(STEPS, parameters[STEPS].default)
        self.folder = SimpleNamespace(
            call_parameters=parameters,
            calls=lambda steps: calls_of(scheduler, steps),
            training_steps=training_steps_of(scheduler),
        )
        calls = self.folder.calls(self.options[STEPS]) if STEPS in self.options else len(scheduler.timesteps)
        Pipeline.__init__(self, type(pipe).__name__, Loop(seed, calls), 1, batch_size)
        self.network, self.device, self.precision_name = Denoiser(network), network.device, "full"
        self.probe()
