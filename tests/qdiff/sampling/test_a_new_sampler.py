"""A sampler of one's own is a row: both families' command lines choose it, and a pipeline runs it."""

from __future__ import annotations

import argparse

import pytest
import torch
from families import SCRIPTS

from ddim.pipeline import ddim_sampler
from qdiff.errors import UserError
from qdiff.sampling import SAMPLERS, Sampler, SamplerOptions, find_sampler
from qdiff.sampling.registry import SamplerRow


def _euler(eps, x_T, run):
    """Steps of equal length along ε."""
    x = x_T
    for t in reversed(run.timesteps):
        x = x - eps(x, torch.full((len(x),), t)) / len(run.timesteps)
    return x


@pytest.fixture
def euler(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "euler", SamplerRow("euler", "Euler", _euler))


def chosen(script, *words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    SCRIPTS[script].add_options(parser)
    return parser.parse_args([str(word) for word in words])


def test_both_families_choose_it(euler):
    ddim = chosen("sample_diffusion_ddim", "--config", "c.yml", "--sample_type", "euler")
    assert ddim.sample_type == "euler"
    for script in ("sample_diffusion_ldm", "sample_diffusion_ldm_imagenet", "txt2img"):
        seed = ("--seed", 1) if script == "sample_diffusion_ldm" else ()
        assert chosen(script, "--sampler", "euler", *seed).sampler == "euler"


def test_without_its_row_nobody_knows_it():
    with pytest.raises(argparse.ArgumentError, match="euler"):
        chosen("sample_diffusion_ddim", "--config", "c.yml", "--sample_type", "euler")
    with pytest.raises(UserError, match="the sampler is 'euler'; choose one of ddim"):
        find_sampler("euler")


def test_it_runs(euler, tiny_config, tiny_network):
    options = SamplerOptions("euler", steps=4)
    sampler = ddim_sampler(tiny_config, options, 7)
    assert isinstance(sampler, Sampler) and sampler.calls == 4
    with torch.no_grad():
        made, ddim = sampler(tiny_network, [0, 1]), ddim_sampler(tiny_config, SamplerOptions(steps=4), 7)
        assert made.shape == (2, 1, 8, 8) and not torch.allclose(made, ddim(tiny_network, [0, 1]))
    with pytest.raises(UserError, match=r"eta is 0\.5 but Euler has no eta"):
        ddim_sampler(tiny_config, SamplerOptions("euler", steps=4, eta=0.5), 7)
