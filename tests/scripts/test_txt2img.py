"""Sampling a text-conditional latent model: prompts, guidance, samplers, sizes, calibration, and bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from latent_models import FEW, GREY_LEVELS, TOKENS, W4A8
from PIL import Image
from run_checks import image_bytes, largest_difference, lose_images, manifest, pixels, succeeded
from thorough import thorough_except

SCRIPT = "txt2img"
PROMPTS = ("a handwritten three", "the digit seven", "zero")
IMAGES = 5  # of 6: the three prompts twice, less one
SAMPLER = ("--ddim_steps", 4, "--seed", 7)
PTQ = (*W4A8, "--split", "--sm_abit", 16, "--cond", "--no_grad_ckpt", *FEW)


@pytest.fixture(scope="module")
def options(latent):
    return *latent("text").options, *SAMPLER


@pytest.fixture(scope="module")
def listed(options, tmp_path_factory):
    """Options of the runs over a file of prompts, in batches of two."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return *options, "--plms", "--n_samples", 2, "--from-file", path, "--max_images", IMAGES


@pytest.fixture(scope="module")
def float_run(call, listed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "float"
    succeeded(call(SCRIPT, *listed, "--outdir", folder))
    return folder


@pytest.fixture(scope="module")
def calibrated_run(call, listed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "w4a8"
    succeeded(call(SCRIPT, *listed, *PTQ, "--outdir", folder))
    return folder


# --- Runs


def test_float_run_shows_the_prompts_in_turn(float_run):
    run, made = manifest(float_run), pixels(float_run)
    assert made.shape == (IMAGES, 16, 16, 3) and np.mean((made > 0) & (made < 255)) > 0.5
    assert run["config"]["prompts"] == [*PROMPTS, *PROMPTS][:IMAGES]
    assert run["labels"] == [3, 7, 0, 3, 7]
    assert run["config"]["sampler"] == {"kind": "plms", "steps": 4, "eta": 0.0, "scale": 7.5, "fixed_code": None}
    assert len(set(image_bytes(float_run).values())) == IMAGES


def test_calibrated_run(calibrated_run, float_run):
    run = manifest(calibrated_run)
    recorded = torch.load(calibrated_run / "calibration_data.pt", weights_only=True)
    assert {key: tuple(rows.shape) for key, rows in recorded.items()} == {
        "xs": (2, 3, 4, 8, 8), "ts": (2, 3), "cs": (2, 3, TOKENS, 32), "ucs": (2, 3, TOKENS, 32)
    }  # fmt: skip
    assert run["activation_quantizers"]["total"] > 20 and run["activation_quantizers"]["silent"] == []
    assert run["config"]["ptq"]["quant"]["softmax_bits"] == 16
    assert 0 < run["noise_error"]["mse"] < run["noise_error"]["float_mean_square"]
    assert largest_difference(calibrated_run, float_run) > GREY_LEVELS


@pytest.mark.slow
@pytest.mark.parametrize("resume", thorough_except(("--resume", "--resume_w", None), None))
def test_own_checkpoint_gives_the_calibrated_images(resume, call, listed, calibrated_run, tmp_path):
    """The weights alone, or all of it; with or without saying so."""
    loaded = ("--cali_ckpt", calibrated_run / "quantized.safetensors", *([resume] if resume else []))
    if resume == "--resume_w":
        loaded += ("--cali_data_path", calibrated_run / "calibration_data.pt")
    succeeded(call(SCRIPT, *listed, *PTQ, *loaded, "--outdir", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(calibrated_run)


@pytest.mark.slow
def test_killed_run_makes_the_missing_images_again(call, listed, calibrated_run, tmp_path):
    shutil.copytree(calibrated_run, tmp_path / "killed")
    lose_images(tmp_path / "killed", 2, 3, 4)
    outcome = succeeded(call(SCRIPT, *listed, *PTQ, "--outdir", tmp_path / "killed"))
    assert image_bytes(tmp_path / "killed") == image_bytes(calibrated_run)
    assert "calibrating" not in outcome.err


def test_batch_size_does_not_change_images(call, listed, float_run, tmp_path):
    """Without --fixed_code, --n_samples is but the batch of a file's prompts."""
    succeeded(call(SCRIPT, *listed, "--n_samples", 5, "-l", tmp_path / "run"))
    assert largest_difference(tmp_path / "run", float_run) <= GREY_LEVELS


@pytest.mark.slow
def test_precision_is_full_on_the_cpu(call, listed, float_run, tmp_path):
    succeeded(call(SCRIPT, *listed, "--precision", "full", "-l", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(float_run)


@pytest.mark.slow
def test_guidance_and_samplers_differ(call, options, tmp_path):
    one = (*options, "--prompt", "two", "--n_samples", 2, "--n_iter", 1)
    folders = {}
    for name, more in {
        "ddim": (),
        "noisy": ("--ddim_eta", 1.0),
        "scale 1": ("--scale", 1.0),
        "plms": ("--plms",),
        "dpm": ("--dpm",),
    }.items():
        folders[name] = tmp_path / name
        succeeded(call(SCRIPT, *one, *more, "--outdir", folders[name]))
        others = [f for n, f in folders.items() if n != name]
        assert all(largest_difference(folders[name], other) > GREY_LEVELS for other in others), name
    kinds = {n: manifest(f)["config"]["sampler"]["kind"] for n, f in folders.items()}
    assert kinds == {"ddim": "ddim", "noisy": "ddim", "scale 1": "ddim", "plms": "plms", "dpm": "dpm_solver"}


# --- Prompts


@pytest.mark.slow
def test_a_prompt_is_drawn_n_samples_times_n_iter(call, options, tmp_path):
    succeeded(call(SCRIPT, *options, "--prompt", "two", "--n_samples", 2, "--n_iter", 2, "--outdir", tmp_path / "a"))
    run = manifest(tmp_path / "a")
    assert run["config"]["prompts"] == ["two"] * 4 and run["labels"] == [2] * 4
    assert len(set(image_bytes(tmp_path / "a").values())) == 4
    fixed = ("--fixed_code", "--prompt", "two", "--n_samples", 2)
    succeeded(call(SCRIPT, *options, *fixed, "--outdir", tmp_path / "fixed"))
    made = list(image_bytes(tmp_path / "fixed").values())
    assert made[:2] == made[2:] and made[0] != made[1]
    assert made[:2] == list(image_bytes(tmp_path / "a").values())[:2]


def test_coco_captions(call, options, tmp_path):
    entries = [(9, 1, "a cat"), (3, 5, "a dog, late"), (3, 2, "a dog"), (4, 7, "a bird")]
    captions = [{"image_id": image, "id": number, "caption": text} for image, number, text in entries]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"annotations": captions}))
    given = ("--from-file", tmp_path / "captions_val2014.json", "--n_iter", 1, "--prompt", "unused")
    outcome = succeeded(call(SCRIPT, *options, *given, "--outdir", tmp_path / "run"))
    assert manifest(tmp_path / "run")["config"]["prompts"] == ["a dog", "a bird", "a cat"]
    assert "labels" not in manifest(tmp_path / "run") and len(image_bytes(tmp_path / "run")) == 3
    assert "--from-file replaces --prompt" in outcome.err


def test_a_prompt_that_is_cut_is_reported(call, options, tmp_path):
    fits, long = "a handwritten three", "a handwritten three " + "seven " * 8 + "and a unicorn"
    (tmp_path / "prompts.txt").write_text(f"{fits}\n{long}\n")
    given = ("--from-file", tmp_path / "prompts.txt", "--n_iter", 1)
    outcome = succeeded(call(SCRIPT, *options, *given, "--outdir", tmp_path / "run"))
    for text in (outcome.err, (tmp_path / "run" / "run.log").read_text()):
        (line,) = [line for line in text.splitlines() if "was cut" in line]
        assert f"takes {TOKENS} tokens" in line and repr(long) in line
        cut = line.split("was cut off: ")[1].strip("'")
        assert cut.endswith("and a unicorn") and long.endswith(cut) and "handwritten" not in cut


def test_calibration_prompts_of_their_own(call, listed, options, tmp_path):
    (tmp_path / "other.txt").write_text("nine\n")
    given = ("--cali_prompts", tmp_path / "other.txt")
    config = json.loads(succeeded(call(SCRIPT, *listed, *given, *PTQ, "--dry-run")).out)
    assert config["calibration_prompts"] == ["nine"] and config["prompts"][:3] == list(PROMPTS)
    line = call(SCRIPT, *options, "--cali_prompts", tmp_path / "none.txt", "--outdir", tmp_path / "a").error_line()
    assert "--cali_prompts" in line and "none.txt" in line


def test_other_prompts_do_not_continue_a_run(call, options, float_run, tmp_path):
    """The error names what differs, but does not print 10,000 captions."""
    (tmp_path / "many.txt").write_text("\n".join(f"caption {i}" for i in range(10_000)))
    line = call(SCRIPT, *options, "--plms", "--from-file", tmp_path / "many.txt", "--outdir", float_run).error_line()
    assert "prompts: ['a handwritten three'" in line and len(line) < 1000


# --- Sizes and grids


@pytest.mark.slow
def test_another_size(call, options, tmp_path):
    given = ("--n_samples", 2, "--n_iter", 1, "--prompt", "two", "--H", 32, "--W", 24, "--C", 4, "--f", 2)
    succeeded(call(SCRIPT, *options, *given, "--n_rows", 1, "--outdir", tmp_path / "run"))
    assert pixels(tmp_path / "run").shape == (2, 32, 24, 3)
    assert manifest(tmp_path / "run")["config"]["latent_shape"] == [4, 16, 12]
    with Image.open(tmp_path / "run" / "grid.png") as grid:
        assert grid.size == (48, 2 * 65 - 1)  # twice enlarged


@pytest.mark.slow
def test_calibration_at_another_size(call, options, tmp_path):
    given = (*options, "--n_samples", 2, "--n_iter", 1, "--H", 8, "--W", 16, *PTQ, "--quant_mode", "linear")
    succeeded(call(SCRIPT, *given, "--outdir", tmp_path / "run"))
    recorded = torch.load(tmp_path / "run" / "calibration_data.pt", weights_only=True)
    assert recorded["xs"].shape == (2, 3, 4, 4, 8)
    assert manifest(tmp_path / "run")["activation_quantizers"]["silent"] == []


@pytest.mark.slow
def test_skip_grid_and_skip_save(call, options, tmp_path):
    one = (*options, "--n_samples", 1, "--n_iter", 1)
    succeeded(call(SCRIPT, *one, "--skip_grid", "--outdir", tmp_path / "images"))
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["img", "run.json", "run.log"]
    succeeded(call(SCRIPT, *one, "--skip_save", "--outdir", tmp_path / "grid"))
    assert sorted(p.name for p in (tmp_path / "grid").iterdir()) == ["grid.png", "run.json", "run.log"]
