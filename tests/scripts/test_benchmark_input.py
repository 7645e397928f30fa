"""What scripts/benchmark.py refuses: one sentence, before anything is done."""

from __future__ import annotations

import pytest
from benchmark_processes import HereProcess

from qdiff.benchmark import run

SCRIPT, STEPS = "benchmark", 4
QUICK = ("--batch", 1, "--repeats", 0, "--runtimes", "float")  # what is not refused after all soon fails


@pytest.fixture
def here(monkeypatch):
    HereProcess.forget()
    monkeypatch.setattr(run, "FreshProcess", HereProcess)
    return HereProcess


REFUSED = {
    "batch": (("--random", "--batch", 0), "--batch is 0; give at least 1"),
    "repeats": (("--random", "--repeats", -1), "--repeats is -1; give at least 0"),
    "threads": (("--random", "--threads", 0), "--threads is 0; give at least 1"),
    "cache": (("--random", "--weight_cache", -1), "--weight_cache is -1.0; give 0 or more MiB"),
    "names": (("--random", "--runtimes", "torch,cuda"), "--runtimes has no 'cuda'; choose from float, "),
    "weights": (("--random", "--ckpt", "x"), "--random uses random weights and contradicts --ckpt; leave one of"),
    "checkpoint": (("--random", "--ptq", "--cali_ckpt", "x"), "contradicts --cali_ckpt; leave one of them out"),
    "method": (("--random", "--method", "eda-dm"), "--random rounds to nearest and contradicts --method eda-dm"),
    "float": (("--use_pretrained",), "give --ptq and --cali_ckpt PATH, or --random"),
    "calibrate": (("--use_pretrained", "--ptq"), "give --ptq and --cali_ckpt PATH, or --random"),
    "modulated": (("--random", "--modulate"), "but one call is measured; add --measure sampling"),
    "one step": (
        ("--random", "--modulate", "--measure", "sampling", "--timesteps", 1),
        "this sampler has one step; give more",
    ),
    "document": (("--random", "--document", "none.md"), "none.md cannot be read"),
    "no file": (("--ckpt", "x", "--ptq", "--cali_ckpt", "none.pth"), "none.pth does not exist; check the path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, call, tiny, here):
    options, sentence = REFUSED[case]
    assert sentence in call(SCRIPT, "--config", tiny.config, "--timesteps", 4, *QUICK, *options).error_line()
    assert here.tasks == []


def test_conditions_need_an_encoder(call, latent, here):
    words = ("--like", "txt2img", "--config", latent("text").config, "--random", "--ddim_steps", STEPS, *QUICK)
    line = call(SCRIPT, *words, "--measure", "sampling").error_line()
    assert "--like txt2img samples with conditions, which need an encoder's weights" in line and here.tasks == []
