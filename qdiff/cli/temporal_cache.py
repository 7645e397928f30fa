"""``--cache_temporal``: what depends on the timestep alone, computed once per timestep of a run."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from dataclasses import replace

from torch import nn

from qdiff.cli.options.ptq import PtqPlan
from qdiff.cli.options.temporal_cache import FLOAT
from qdiff.errors import UserError
from qdiff.pipeline import Pipeline
from qdiff.tracing.temporal_cache import cached_temporal, check_temporal, with_float_temporal


def with_temporal_cache(args: Namespace, plan: PtqPlan | None, pipeline: Pipeline) -> PtqPlan | None:
    """Return a plan, with the temporal layers in float where ``--cache_temporal float`` asks for that.

    Args:
        plan: None for a float network.
        pipeline: no weights need be loaded.

    Raises:
        UserError: it is not known what depends on t alone, or such a layer depends on more.
    """
    if args.cache_temporal is None:
        return plan
    if not pipeline.sampler.visited():
        raise UserError(
            "--cache_temporal needs a network and a sampler of this project, whose timesteps are known; leave it out"
        )
    network, _ = pipeline.build_network()
    if plan is not None and args.cache_temporal == FLOAT:
        plan = replace(plan, quant=with_float_temporal(plan.quant, network))
    check_temporal(network, None if plan is None else plan.quant)
    return plan


def cached_timesteps(args: Namespace, pipeline: Pipeline) -> list[float]:
    """Return the distinct timesteps whose outputs a run keeps; none without ``--cache_temporal``."""
    return [] if args.cache_temporal is None else list(dict.fromkeys(pipeline.sampler.visited()))


def temporal_cache(args: Namespace, pipeline: Pipeline, network: nn.Module) -> contextlib.AbstractContextManager:
    """Return the context in which a run samples with a network, float or quantized."""
    timesteps = cached_timesteps(args, pipeline)
    return cached_temporal(network, timesteps) if timesteps else contextlib.nullcontext()
