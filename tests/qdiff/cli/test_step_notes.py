"""Where a sampler takes another number of steps than it was asked for, that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import SCRIPTS

from qdiff.cli.options.parser import Parser

REPOSITORY = Path(__file__).parents[3]
LATENT = REPOSITORY / "models" / "ldm"
MODELS = {
    "sample_diffusion_ddim": (("--config", REPOSITORY / "configs" / "digits.yml", "--use_pretrained"), "--timesteps"),
    "sample_diffusion_ldm": (("-r", LATENT / "digits_vq", "--seed", 1), "--custom_steps"),
    "sample_diffusion_ldm_imagenet": (("--config", LATENT / "digits_class" / "config.yaml"), "--ddim_steps"),
    "txt2img": (("--config", LATENT / "digits_text" / "config.yaml", "--plms"), "--ddim_steps"),
}


def notes(script, steps, *more):
    words, option = MODELS[script]
    parser = Parser(None)
    SCRIPTS[script].add_options(parser)
    args, _ = parser.parse_known_args([str(w) for w in (*words, option, steps, *more)])
    args.batch_size = None
    return [note for note in SCRIPTS[script].pipeline_of(args).notes if "training steps" in note]


@pytest.mark.parametrize("script", MODELS)
def test_steps_that_do_not_divide(script):
    option = MODELS[script][1]
    assert notes(script, 20) == []
    (note,) = notes(script, 350)
    assert note.startswith(f"{option} 350 does not divide the 1000 training steps: 500 steps are taken")


def test_samplers_that_space_their_steps_themselves():
    assert notes("sample_diffusion_ddim", 30, "--sample_type", "dpm_solver") == []
    assert notes("sample_diffusion_ldm", 30, "--dpm") == []
    assert notes("sample_diffusion_ddim", 30, "--skip_type", "quad") == []


def test_a_sampler_that_takes_all_steps():
    for script, words in (("sample_diffusion_ddim", ("--sample_type", "ancestral")), ("sample_diffusion_ldm", ("-v",))):
        parser = Parser(None)
        SCRIPTS[script].add_options(parser)
        given, option = MODELS[script]
        args, _ = parser.parse_known_args([str(w) for w in (*given, option, 30, *words)])
        args.batch_size = None
        (note,) = SCRIPTS[script].pipeline_of(args).notes
        assert note == f"{option} 30 has no effect: DDPM over all training steps takes 1000 steps"
