"""A pipeline that is loaded already, as the `Pipeline` by whose results widths are chosen."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from qdiff.diffusers_backend.module import Denoiser
from qdiff.diffusers_backend.pipeline import DiffusersPipeline, Loop
from qdiff.pipeline import Pipeline

STEPS = "num_inference_steps"
PLACED = {"timesteps", "sigmas"}  # options that say which steps are taken, in the place of their number


class PipelineInMemory(DiffusersPipeline):
    """A ``DiffusionPipeline`` object in the place of a folder.

    Args:
        pipe: the pipeline; it and its values are as before afterwards.
        component, network: name and module of what is quantized.
        seed: the noise of image i depends only on (seed, i).
        batch_size: images per batch.
        prompts: used in turn; for text pipelines.
        options: further keywords of the pipeline's call.

    Raises:
        UserError: the pipeline does not call this network, or not for a sample.
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
        self.folder = SimpleNamespace(call_parameters=inspect.signature(type(pipe).__call__).parameters)
        self.network, self.device, self.precision_name = Denoiser(network), network.device, "full"
        Pipeline.__init__(self, type(pipe).__name__, Loop(seed, 1), 1, batch_size)
        self.probe(range(batch_size))
        self._set_calls()

    def _set_calls(self) -> None:
        self._calls_in_loop = self.count_calls(range(self.batch_size))
        self.sampler = Loop(self.sampler.seed, self._calls_in_loop)

    def with_steps(self, steps: int) -> PipelineInMemory:
        made = copy.copy(self)
        if STEPS in self.folder.call_parameters and not PLACED & set(self.options):
            made.options = {**self.options, STEPS: steps}
            made._set_calls()
        return made
