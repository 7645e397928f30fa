"""Recording calibration sets of latent models: what is in the files, and that a run takes the right ones only."""

from __future__ import annotations

import pytest
import torch
from latent_models import CLASSES, FEW, TOKENS, W4A8
from run_checks import image_bytes, manifest, sha256, succeeded
from script_device import ON_DEVICE
from thorough import thorough_except

COLLECT = "collect_calibration"
SCRIPTS = {"unconditional": "sample_diffusion_ldm", "class": "sample_diffusion_ldm_imagenet", "text": "txt2img"}
KINDS = pytest.mark.parametrize("kind", SCRIPTS)
CONTEXT = {"unconditional": None, "class": (1, 32), "text": (TOKENS, 32)}
STEPS = {"unconditional": "-c", "class": "--ddim_steps", "text": "--ddim_steps"}
COUNT = {  # two images
    "unconditional": ("-n", 2),
    "class": ("--n_samples", 2),
    "text": ("--prompt", "two", "--n_samples", 2, "--n_iter", 1),
}


@pytest.fixture(scope="module")
def model_options(latent):
    """Options of a kind's model and sampler: four steps of one seed."""

    def options(kind: str) -> tuple[object, ...]:
        files = latent(kind)
        named = ("-r", files.folder, *ON_DEVICE) if kind == "unconditional" else files.options
        return *named, STEPS[kind], 4, "--seed", 7

    return options


@pytest.fixture(scope="module")
def recorded(call, model_options, tmp_path_factory):
    """The files of all kinds: two steps of five samples."""
    folder = tmp_path_factory.mktemp("recorded")
    files = {kind: folder / f"{kind}.pt" for kind in SCRIPTS}
    for kind, out in files.items():
        prompt = ("--prompt", "two") if kind == "text" else ()
        options = (*model_options(kind), *prompt, "--batch_size", 5, "--cali_st", 2, "--cali_n", 5, "--out", out)
        assert str(out) in succeeded(call(COLLECT, "--like", SCRIPTS[kind], *options)).out
    return files


@KINDS
def test_published_format(kind, recorded):
    made = torch.load(recorded[kind], weights_only=True)
    channels = 4 if kind == "text" else 3
    shapes = {"xs": (2, 5, channels, 8, 8), "ts": (2, 5)}
    if CONTEXT[kind]:
        shapes |= {"cs": (2, 5, *CONTEXT[kind]), "ucs": (2, 5, *CONTEXT[kind])}
    assert {key: tuple(rows.shape) for key, rows in made.items()} == shapes
    assert made["ts"].tolist() == [[31] * 5, [11] * 5]  # every second of 31, 21, 11, 1
    assert len(made["xs"].flatten(0, 1).flatten(1).unique(dim=0)) == 10


def test_conditions_are_those_of_the_images(recorded):
    classes, text = (torch.load(recorded[kind], weights_only=True) for kind in ("class", "text"))
    for step in range(2):
        for i in range(5 - CLASSES):  # classes in turn
            assert torch.equal(classes["cs"][step, i], classes["cs"][step, i + CLASSES])
        assert len(classes["cs"][step].flatten(1).unique(dim=0)) == CLASSES
        assert len(classes["ucs"][step].flatten(1).unique(dim=0)) == 1
        torch.testing.assert_close(text["cs"][step, 0], text["cs"][step, 4])
    assert not torch.allclose(text["cs"][0, 0], text["ucs"][0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", thorough_except(SCRIPTS, "class"))
def test_a_run_takes_the_file_and_would_record_the_same(kind, call, model_options, recorded, tmp_path):
    run = (*model_options(kind), *COUNT[kind], *W4A8, *FEW, "--quant_mode", "linear", "--cali_n", 5, "--batch_size", 5)
    succeeded(call(SCRIPTS[kind], *run, "--cali_data_path", recorded[kind], "-l", tmp_path / "given"))
    kept = manifest(tmp_path / "given")
    assert kept["files"]["calibration data"] == {"path": str(recorded[kind]), "sha256": sha256(recorded[kind])}
    assert kept["activation_quantizers"]["silent"] == [] and kept["noise_error"]["samples"] > 0
    succeeded(call(SCRIPTS[kind], *run, "-l", tmp_path / "own"))
    here = torch.load(tmp_path / "own" / "calibration_data.pt", weights_only=True)
    there = torch.load(recorded[kind], weights_only=True)
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    assert image_bytes(tmp_path / "own") == image_bytes(tmp_path / "given")


@pytest.mark.slow
@pytest.mark.parametrize("kind", thorough_except(("class", "text"), "text"))
def test_without_guidance_only_conditions_are_recorded(kind, call, model_options, tmp_path):
    out = tmp_path / "data.pt"
    options = (*model_options(kind), "--scale", 1.0)
    sizes = ("--cali_st", 2, "--cali_n", 3, "--out", out)
    succeeded(call(COLLECT, "--like", SCRIPTS[kind], *options, *sizes))
    assert set(torch.load(out, weights_only=True)) == {"xs", "ts", "cs"}
    run = (*options, *COUNT[kind], *W4A8, *FEW, "--quant_mode", "linear", "-l", tmp_path / "run")
    succeeded(call(SCRIPTS[kind], *run, "--cali_data_path", out))
    assert len(image_bytes(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("like", "more", "calls"),
    [
        ("txt2img", ("--plms",), 5),
        ("txt2img", ("--dpm",), 4),
        ("sample_diffusion_ldm", ("--dpm",), 4),
        ("sample_diffusion_ldm", ("-v",), 40),
    ],
)
def test_every_call_of_every_sampler_can_be_recorded(like, more, calls, call, model_options, tmp_path):
    kind = next(k for k, script in SCRIPTS.items() if script == like)
    options = (*model_options(kind), *more, "--cali_n", 1, "--out", tmp_path / "data.pt")
    succeeded(call(COLLECT, "--like", like, *options, "--cali_st", calls))
    assert len(torch.load(tmp_path / "data.pt", weights_only=True)["xs"]) == calls
    assert f"--cali_st 1 to {calls}" in call(COLLECT, "--like", like, *options, "--cali_st", calls + 1).error_line()


# --- Files of other models


def changed(path, folder, **entries):
    made = torch.load(path, weights_only=True) | entries
    torch.save({key: rows for key, rows in made.items() if rows is not None}, folder / "changed.pt")
    return folder / "changed.pt"


def refused(call, model_options, kind, path, folder):
    run = (*model_options(kind), *COUNT[kind], *W4A8, *FEW, "--cali_data_path", path, "-l", folder / "run")
    line = call(SCRIPTS[kind], *run).error_line()
    assert str(path) in line and not (folder / "run").exists()
    return line


def test_a_conditional_file_for_an_unconditional_model(call, model_options, recorded, tmp_path):
    line = refused(call, model_options, "unconditional", recorded["class"], tmp_path)
    assert "holds conditions (cs) but the network takes none" in line


def test_an_unconditional_file_for_a_conditional_model(call, model_options, recorded, tmp_path):
    assert "holds no conditions" in refused(call, model_options, "class", recorded["unconditional"], tmp_path)


@pytest.mark.slow
def test_latents_of_another_shape(call, model_options, recorded, tmp_path):
    line = refused(call, model_options, "class", recorded["text"], tmp_path)
    assert "(4, 8, 8)" in line and "(3, 8, 8)" in line


@pytest.mark.parametrize("shape", [(TOKENS, 16), (TOKENS - 1, 32), (1, 32)])
def test_conditions_of_another_shape(shape, call, model_options, recorded, tmp_path):
    """Another width, another length, and a class's for a text model: found before any work is done."""
    other = torch.zeros(2, 5, *shape)
    line = refused(call, model_options, "text", changed(recorded["text"], tmp_path, cs=other, ucs=other), tmp_path)
    assert str(shape) in line and str(CONTEXT["text"]) in line


@pytest.mark.parametrize(
    "entries",
    [{"ucs": torch.zeros(2, 5, TOKENS, 16)}, {"cs": torch.zeros(2, 5, 32)}, {"ucs": torch.zeros(2, 4, TOKENS, 32)}],
    ids=["halves differ", "no length", "too few"],
)
def test_malformed_conditions(entries, call, model_options, recorded, tmp_path):
    path = changed(recorded["text"], tmp_path, **entries)
    options = (*FEW, "--cali_n", 5)
    run = (*model_options("text"), *COUNT["text"], *W4A8, *options, "--cali_data_path", path, "-l", tmp_path / "run")
    assert "malformed" in call("txt2img", *run).error_line()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--like", "train_ldm"), "train_ldm"),
        (("--like",), "--like"),
        (("--like", "sample_diffusion_ldm"), "--seed"),
        (("--like", "txt2img", "--plms", "--dpm"), "--plms and --dpm"),
        (("--like", "txt2img", "-c", 4), "-c"),
        (("--like", "txt2img", "--cali_prompts", "none.txt"), "--cali_prompts"),
        (("--like", "sample_diffusion_ldm_imagenet", "--ckpt", "none.ckpt", "--cali_n", 0), "--cali_n"),
    ],
)
def test_bad_input_is_one_sentence(words, says, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in call(COLLECT, *words, "--out", tmp_path / "new" / "a.pt").error_line()
    assert list(tmp_path.iterdir()) == []


def test_a_cut_prompt_is_reported(call, model_options, tmp_path):
    (tmp_path / "long.txt").write_text("a handwritten three " + "seven " * 8 + "and a unicorn\n")
    options = (*model_options("text"), "--cali_prompts", tmp_path / "long.txt", "--out", tmp_path / "a.pt")
    outcome = succeeded(call(COLLECT, "--like", "txt2img", *options, "--cali_st", 1, "--cali_n", 1))
    assert "was cut" in outcome.err and "unicorn" in outcome.err
