"""The noise schedule that a latent diffusion config describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddim.samplers import DiffusionSchedule, make_beta_schedule


def build_schedule(params: Mapping[str, Any]) -> DiffusionSchedule:
    """Return the schedule of ``model.params``: what these configs call "linear" is linear in √β."""
    start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
    return DiffusionSchedule(make_beta_schedule("scaled_linear", start, end, params.get("timesteps", 1000)))
