"""Samplers as linear maps of the network's outputs."""

from __future__ import annotations

import pytest
import torch

from qdiff.errors import UserError
from qdiff.sampling import DiffusionSchedule, Sampler, SamplerOptions, make_beta_schedule

SCHEDULE = DiffusionSchedule(make_beta_schedule("linear", 1e-4, 2e-2, 100))
EXACT = 1e-4  # relative; images are float32


def sampler(**options):
    return Sampler(SCHEDULE, (2, 3, 3), SamplerOptions(**options), seed=5)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "ddim", "steps": 10},
        {"kind": "ddim", "steps": 5, "eta": 0.7, "spacing": "quad", "ends_clean": False, "offset": 1},
        {"kind": "plms", "steps": 10},
        {"kind": "dpm_solver", "steps": 7, "order": 3},
        {"kind": "dpm_solver", "steps": 6, "order": 2, "method": "singlestep"},
    ],
)
def test_inputs_and_result_follow_from_the_outputs(options):
    made = sampler(**options)
    outputs = torch.randn(made.calls, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))

    def run(used):
        """Every call's x and the result, where the network returns given values."""
        seen = []

        def network(x, t):
            seen.append(x.clone())
            return used[len(seen) - 1]

        result = made(network, range(4))
        return torch.stack([*seen, result])

    moved = run(outputs) - run(torch.zeros_like(outputs))  # what x_T and drawn noise contribute cancels out
    response = made.response()
    assert response.shape == (made.calls + 1, made.calls) and response.dtype == torch.float64
    expected = torch.einsum("kj,j...->k...", response, outputs.double())
    error = (moved.double() - expected).abs().max() / expected.abs().max()
    assert error < EXACT
    assert torch.equal(response[:-1].triu(), torch.zeros_like(response[:-1]))  # no input depends on a later output
    planted = response.clone()
    planted[-1, 2] *= 1.01
    assert (moved.double() - torch.einsum("kj,j...->k...", planted, outputs.double())).abs().max() > EXACT * 10


def test_a_sampler_that_clips_has_none():
    with pytest.raises(UserError, match="clips the predicted x_0, so its result is not linear"):
        sampler(kind="ddpm_noisy", steps=10).response()


@pytest.mark.parametrize(
    ("kind", "then"), [("ddim", ("ddim", 0.3)), ("ddpm_noisy", ("ddim", 1.0)), ("plms", ("plms", 0))]
)
def test_fewer_steps(kind, then):
    made = sampler(kind=kind, steps=50, eta=0.3 if kind == "ddim" else 0.0).with_steps(10)
    assert (made.options.kind, made.options.eta) == then and made.options.steps == 10
    assert sampler(kind="ancestral", steps=5).calls == 100
    assert sampler(kind="ancestral", steps=5).with_steps(5).calls == 5
