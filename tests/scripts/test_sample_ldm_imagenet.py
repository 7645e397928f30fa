"""Sampling a class-conditional latent model: classes in turn, guidance, calibration, grids, and bad input."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_models import CLASSES, FEW, GREY_LEVELS, W4A8
from PIL import Image
from run_checks import image_bytes, largest_difference, lose_images, manifest, pixels, snapshot, succeeded
from safetensors.torch import load_file, save_file

SCRIPT = "sample_diffusion_ldm_imagenet"
REPOSITORY = Path(__file__).parents[2]
IMAGES = 7
SAMPLER = ("--n_samples", IMAGES, "--n_batch", 3, "--ddim_steps", 4, "--seed", 7)
PTQ = (*W4A8, "--split", "--cond", "--no_grad_ckpt", *FEW)
CELL = 64 + 1  # a 16×16 image in the grid, four times enlarged, and the line beside it


@pytest.fixture(scope="module")
def options(latent):
    return *latent("class").options, *SAMPLER


@pytest.fixture(scope="module")
def float_run(call, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("class") / "float"
    succeeded(call(SCRIPT, *options, "-l", folder))
    return folder


@pytest.fixture(scope="module")
def calibrated_run(call, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("class") / "w4a8"
    succeeded(call(SCRIPT, *options, *PTQ, "-l", folder))
    return folder


def test_float_run_shows_the_classes_in_turn(float_run):
    run = manifest(float_run)
    assert pixels(float_run).shape == (IMAGES, 16, 16, 3)
    assert run["labels"] == [i % CLASSES for i in range(IMAGES)] == [0, 1, 2, 0, 1, 2, 0]
    assert run["num_images"] == IMAGES and run["config"]["seed"] == 7
    assert run["config"]["sampler"] == {"kind": "ddim", "steps": 4, "eta": 0.0, "scale": 3.0, "fixed_code": None}
    with Image.open(float_run / "grid.png") as grid:
        assert grid.size == (3 * CELL - 1, 3 * CELL - 1)


@pytest.mark.slow
def test_the_label_decides_the_image(call, latent, options, float_run, tmp_path):
    """With the vectors of classes 0 and 1 exchanged, the images of these classes change and no others do."""
    state = load_file(latent("class").weights)
    name = "cond_stage_model.embedding.weight"
    state[name] = state[name][[1, 0, 2, 3]].contiguous()
    save_file(state, tmp_path / "exchanged.safetensors")
    succeeded(call(SCRIPT, *options, "--ckpt", tmp_path / "exchanged.safetensors", "-l", tmp_path / "run"))
    same = [a == b for a, b in zip(*(image_bytes(f).values() for f in (float_run, tmp_path / "run")), strict=True)]
    assert same == [label == 2 for label in manifest(float_run)["labels"]]


def test_calibrated_run(calibrated_run, float_run):
    run = manifest(calibrated_run)
    recorded = torch.load(calibrated_run / "calibration_data.pt", weights_only=True)
    assert {key: tuple(rows.shape) for key, rows in recorded.items()} == {
        "xs": (2, 3, 3, 8, 8), "ts": (2, 3), "cs": (2, 3, 1, 32), "ucs": (2, 3, 1, 32)
    }  # fmt: skip
    assert not torch.equal(recorded["cs"][0, 0], recorded["cs"][0, 1])  # classes in turn here too
    assert torch.equal(recorded["ucs"][0, 0], recorded["ucs"][1, 2])
    assert run["activation_quantizers"]["total"] > 20 and run["activation_quantizers"]["silent"] == []
    assert run["labels"] == manifest(float_run)["labels"]
    assert 0 < run["noise_error"]["mse"] < run["noise_error"]["float_mean_square"]
    assert largest_difference(calibrated_run, float_run) > GREY_LEVELS


@pytest.mark.thorough  # test_txt2img
def test_own_checkpoint_gives_the_calibrated_images(call, options, calibrated_run, tmp_path):
    loaded = ("--cali_ckpt", calibrated_run / "quantized.safetensors")
    succeeded(call(SCRIPT, *options, *W4A8, "--split", *loaded, "-l", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(calibrated_run)


@pytest.mark.thorough  # test_sample_diffusion_ddim
def test_resume_w_calibrates_activations_for_loaded_weights(call, options, calibrated_run, tmp_path):
    loaded = ("--resume_w", "--cali_ckpt", calibrated_run / "quantized.safetensors")
    succeeded(call(SCRIPT, *options, *PTQ, *loaded, "-l", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(calibrated_run)  # it records the same set


@pytest.mark.thorough  # test_txt2img
def test_killed_run_makes_the_missing_images_again(call, options, calibrated_run, tmp_path):
    shutil.copytree(calibrated_run, tmp_path / "killed")
    lose_images(tmp_path / "killed", 0, 1, 2, 6)
    outcome = succeeded(call(SCRIPT, *options, *PTQ, "-l", tmp_path / "killed"))
    assert image_bytes(tmp_path / "killed") == image_bytes(calibrated_run)
    assert "calibrating" not in outcome.err and "recording" not in outcome.err
    assert manifest(tmp_path / "killed")["labels"] == manifest(calibrated_run)["labels"]


@pytest.mark.slow
def test_batch_size_and_scale(call, options, float_run, tmp_path):
    succeeded(call(SCRIPT, *options, "--n_batch", 5, "-l", tmp_path / "batch"))
    assert largest_difference(tmp_path / "batch", float_run) <= GREY_LEVELS
    succeeded(call(SCRIPT, *options, "--scale", 1.0, "-l", tmp_path / "scale"))
    assert largest_difference(tmp_path / "scale", float_run) > GREY_LEVELS


def test_published_command(call, monkeypatch):
    """EDA-DM's, less the options of its own recipe."""
    monkeypatch.chdir(REPOSITORY)
    words = (
        "--cond --ptq --no_grad_ckpt --split --ddim_steps 20 --ddim_eta 0.0 --ckpt cin256.ckpt "
        "--config configs/latent-diffusion/cin256-v2.yaml --logdir result/imagenet --dataset imagenet --device cuda:0 "
        "--skip_grid --skip_save --save-npz --n_samples 50000 --n_batch 50 --n_rows 8 --weight_bit 4 --quant_act "
        "--act_bit 8 --sm_abit 8 --precision full --scale 3.0 --quant_mode qdiff --verbose --dry-run"
    )
    outcome = succeeded(call(SCRIPT, *shlex.split(words)))
    config = json.loads(outcome.out)
    assert outcome.err == "" and config["weights"] == "cin256.ckpt"
    assert (config["num_images"], config["latent_shape"], config["seed"]) == (50000, [3, 64, 64], 1234)
    assert config["ptq"]["quant"]["split_shortcut"] is True


def test_defaults(call, tmp_path, monkeypatch):
    """The bundled model, unless ImageNet's checkpoint lies where the published script looks for it."""
    import ldm.locate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ldm.locate, "REPOSITORY", tmp_path)
    config = json.loads(succeeded(call(SCRIPT, "--dry-run")).out)
    assert config["weights"].endswith("models/ldm/digits_class/model.safetensors")
    assert (config["num_images"], config["seed"], config["precision"]) == (3, 1234, "autocast")
    assert (config["sampler"]["steps"], config["sampler"]["scale"], config["sampler"]["eta"]) == (20, 3.0, 0.0)
    big = tmp_path / "models" / "ldm" / "cin256" / "model.ckpt"
    big.parent.mkdir(parents=True)
    big.write_bytes(b"")
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    config = json.loads(succeeded(call(SCRIPT, "--dry-run")).out)
    assert config["weights"] == "models/ldm/cin256/model.ckpt" and config["latent_shape"] == [3, 64, 64]


# --- What is written


def grid_size(folder: Path) -> tuple[int, int]:
    with Image.open(folder / "grid.png") as grid:
        return grid.size


@pytest.mark.slow
def test_n_rows_is_the_number_of_columns(call, options, float_run, tmp_path):
    shutil.copytree(float_run, tmp_path / "run")
    for given, columns in ((2, 2), (100, IMAGES)):
        succeeded(call(SCRIPT, *options, "--n_rows", given, "-l", tmp_path / "run"))
        rows = -(-IMAGES // columns)
        assert grid_size(tmp_path / "run") == (columns * CELL - 1, rows * CELL - 1)


@pytest.mark.slow
def test_skip_grid(call, options, tmp_path):
    succeeded(call(SCRIPT, *options, "--skip_grid", "-l", tmp_path / "run"))
    assert not (tmp_path / "run" / "grid.png").exists()
    assert len(image_bytes(tmp_path / "run")) == IMAGES


@pytest.mark.slow
def test_skip_save_keeps_the_grid_alone(call, options, float_run, tmp_path):
    folder = tmp_path / "run"
    succeeded(call(SCRIPT, *options, "--skip_save", "--save-npz", "-l", folder))
    assert sorted(p.name for p in folder.iterdir()) == ["grid.png", "run.json", "run.log", "samples.npz"]
    assert (folder / "grid.png").read_bytes() == (float_run / "grid.png").read_bytes()
    with np.load(folder / "samples.npz") as archive:
        np.testing.assert_array_equal(archive["arr_0"], pixels(float_run))
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    outcome = succeeded(call(SCRIPT, *options, "--skip_save", "-l", folder))
    assert "finished already" in outcome.err
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    succeeded(call(SCRIPT, *options, "-l", folder))  # whoever wants the images after all gets them
    assert image_bytes(folder) == image_bytes(float_run)
    assert manifest(folder)["status"] == "finished"


@pytest.mark.slow
def test_a_killed_run_that_keeps_no_images_starts_over(call, options, calibrated_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(calibrated_run, folder)
    lose_images(folder, 1, 2)
    succeeded(call(SCRIPT, *options, *PTQ, "--skip_save", "-l", folder))
    assert (folder / "grid.png").read_bytes() == (calibrated_run / "grid.png").read_bytes()
    assert not (folder / "img").exists()
    before = snapshot(folder)
    succeeded(call(SCRIPT, *options, *PTQ, "--skip_save", "-l", folder))
    assert snapshot(folder) == before


# --- Bad input

REFUSED = {
    "nothing kept": (("--skip_grid", "--skip_save"), "--skip_grid and --skip_save"),
    "columns": (("--n_rows", -1), "--n_rows is -1"),
    "no images": (("--n_samples", 0), "--n_samples is 0"),
    "batch of none": (("--n_batch", 0), "--n_batch is 0"),
    "batch size of none": (("--batch_size", 0), "--batch_size is 0"),
    "scale": (("--scale", "nan"), "scale is nan"),
    "eta": (("--ddim_eta", -0.5), "eta is -0.5"),
    "steps": (("--ddim_steps", 0), "0 sampling steps"),
    "seed": (("--seed", -1), "--seed is -1"),
    "precision": (("--precision", "half"), "--precision"),
    "quant_mode": (("--quant_mode", "squant"), "--quant_mode"),
    "cali_st": (("--ptq", "--cali_st", 9), "--cali_st 1 to 4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_numbers_are_one_sentence(name, call, options, tmp_path):
    more, says = REFUSED[name]
    assert says in call(SCRIPT, *options, *more, "-l", tmp_path / "run").error_line()
    assert list(tmp_path.iterdir()) == []


def test_models_of_other_families(call, latent, tiny, tmp_path):
    for config, says in (
        (latent("unconditional").config, "not a class-conditional model"),
        (latent("text").config, "not a class-conditional model"),
        (tiny.config, "does not describe a latent diffusion model"),
        (tmp_path / "none.yaml", "does not exist"),
    ):
        assert says in call(SCRIPT, "--config", config, *SAMPLER, "-l", tmp_path / "run").error_line()
    for weights, says in (
        (latent("unconditional").weights, "does not hold the weights"),
        (tiny.weights, "not a latent diffusion checkpoint"),
    ):
        given = ("--config", latent("class").config, "--ckpt", weights, *SAMPLER, "-l", tmp_path / "run")
        assert says in call(SCRIPT, *given).error_line()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_says_where_to_get_it(call, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    line = call(SCRIPT, "--ckpt", tmp_path / "cin256.ckpt", "-l", tmp_path / "run").error_line()
    assert str(tmp_path / "cin256.ckpt") in line and "cin/model.ckpt" in line
