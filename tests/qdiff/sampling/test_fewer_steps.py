"""Samplers of fewer steps."""

from __future__ import annotations

import pytest

from qdiff.sampling import DiffusionSchedule, Sampler, SamplerOptions, make_beta_schedule

SCHEDULE = DiffusionSchedule(make_beta_schedule("linear", 1e-4, 2e-2, 100))


def sampler(**options):
    return Sampler(SCHEDULE, (2, 3, 3), SamplerOptions(**options), seed=5)


@pytest.mark.parametrize(
    ("kind", "then"), [("ddim", ("ddim", 0.3)), ("ddpm_noisy", ("ddim", 1.0)), ("plms", ("plms", 0))]
)
def test_fewer_steps(kind, then):
    made = sampler(kind=kind, steps=50, eta=0.3 if kind == "ddim" else 0.0).with_steps(10)
    assert (made.options.kind, made.options.eta) == then and made.options.steps == 10
    assert sampler(kind="ancestral", steps=5).calls == 100
    assert sampler(kind="ancestral", steps=5).with_steps(5).calls == 5
