"""Sampling an unconditional latent model: float, calibrated, loaded, continued, and refusing bad input."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_models import FEW, GREY_LEVELS
from latent_models import W4A8 as W4A8_UNSIGNED
from run_checks import image_bytes, largest_difference, lose_images, manifest, pixels, sha256, snapshot, succeeded
from script_device import ON_DEVICE
from thorough import thorough_except

SCRIPT = "sample_diffusion_ldm"
REPOSITORY = Path(__file__).parents[2]
IMAGES = 5
SAMPLER = ("-n", IMAGES, "--batch_size", 2, "-c", 4, "-e", 0.5, "--seed", 7)
W4A8 = (*W4A8_UNSIGNED, "--a_sym")

# What W4A8 may move a pixel on average: 4.0 was seen, and 20 for the images of another seed.
MEAN_GREY_LEVELS_LOST = 8.0


@pytest.fixture(scope="module")
def model(latent):
    return latent("unconditional")


@pytest.fixture(scope="module")
def options(model):
    return "-r", model.weights, *ON_DEVICE, *SAMPLER


@pytest.fixture(scope="module")
def float_run(call, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm") / "float"
    succeeded(call(SCRIPT, *options, "-l", folder))
    return folder


@pytest.fixture(scope="module")
def calibrated_run(call, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm") / "w4a8"
    succeeded(call(SCRIPT, *options, *W4A8, *FEW, "-l", folder))
    return folder


# --- What a run leaves behind


def test_float_run(float_run, model):
    made, run = pixels(float_run), manifest(float_run)
    assert made.shape == (IMAGES, 16, 16, 3)
    assert np.mean((made > 0) & (made < 255)) > 0.5  # not saturated: comparisons below see the network
    assert len(set(image_bytes(float_run).values())) == IMAGES
    assert (float_run / "grid.png").is_file()
    assert run["status"] == "finished" and run["config"]["method"] == "float"
    assert run["config"]["seed"] == 7 and run["config"]["num_images"] == run["num_images"] == IMAGES
    assert run["config"]["sampler"] == {"kind": "ddim", "steps": 4, "eta": 0.5, "scale": 1.0, "fixed_code": None}
    assert run["config"]["model"]["params"]["unet_config"]["params"]["model_channels"] == 32
    assert run["files"] == {"float weights": {"path": str(model.weights), "sha256": sha256(model.weights)}}
    assert "labels" not in run and "activation_quantizers" not in run


@pytest.mark.thorough  # test_sample_diffusion_ddim
def test_calibrated_run(calibrated_run, float_run):
    run, plan = manifest(calibrated_run), manifest(calibrated_run)["config"]["ptq"]
    assert run["status"] == "finished" and run["config"]["method"] == "qdiff" and plan["action"] == "calibrate"
    assert (plan["quant"]["weight_range"], plan["quant"]["act_range"]) == ("mse", "mse")  # the published defaults
    recorded = torch.load(calibrated_run / "calibration_data.pt", weights_only=True)
    assert set(recorded) == {"xs", "ts"} and recorded["xs"].shape == (2, 3, 3, 8, 8)
    assert run["activation_quantizers"]["total"] > 20 and run["activation_quantizers"]["silent"] == []
    assert 0 < run["noise_error"]["mse"] < run["noise_error"]["float_mean_square"]
    assert 0 < np.abs(pixels(calibrated_run) - pixels(float_run)).mean() < MEAN_GREY_LEVELS_LOST


def test_folder_and_file_name_the_same_model(call, model, float_run, tmp_path):
    succeeded(call(SCRIPT, "-r", model.folder, *ON_DEVICE, *SAMPLER, "-l", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(float_run)


@pytest.mark.slow
def test_batch_size_does_not_change_images(call, options, float_run, tmp_path):
    succeeded(call(SCRIPT, *options, "--batch_size", 5, "-l", tmp_path / "run"))
    assert largest_difference(tmp_path / "run", float_run) <= GREY_LEVELS
    succeeded(call(SCRIPT, *options, "--seed", 8, "-l", tmp_path / "other"))  # planted: another seed
    assert np.abs(pixels(tmp_path / "other") - pixels(float_run)).mean() > MEAN_GREY_LEVELS_LOST


@pytest.mark.slow
@pytest.mark.parametrize(("option", "kind", "steps"), [("--dpm", "dpm_solver", 4), ("-v", "ancestral", 4)])
def test_other_samplers(option, kind, steps, call, options, float_run, tmp_path):
    succeeded(call(SCRIPT, *options, "-e", 1.0, option, "-l", tmp_path / "run"))
    assert manifest(tmp_path / "run")["config"]["sampler"]["kind"] == kind
    assert largest_difference(tmp_path / "run", float_run) > GREY_LEVELS
    made = pixels(tmp_path / "run")
    assert np.mean((made > 0) & (made < 255)) > 0.5


# --- Continuing and loading


@pytest.mark.parametrize("kind", thorough_except(("float", "qdiff"), "float"))
def test_killed_run_makes_the_missing_images_again(kind, call, options, float_run, calibrated_run, tmp_path):
    source, more = (float_run, ()) if kind == "float" else (calibrated_run, (*W4A8, *FEW))
    folder = tmp_path / "killed"
    shutil.copytree(source, folder)
    lose_images(folder, 1, 2, 4)
    outcome = succeeded(call(SCRIPT, *options, *more, "-l", folder))
    assert image_bytes(folder) == image_bytes(source)
    assert (folder / "grid.png").read_bytes() == (source / "grid.png").read_bytes()
    assert "calibrating" not in outcome.err and manifest(folder)["status"] == "finished"
    before = snapshot(folder)
    succeeded(call(SCRIPT, *options, *more, "-l", folder))
    assert snapshot(folder) == before


@pytest.mark.thorough  # test_sample_diffusion_ddim
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_own_checkpoint_gives_the_calibrated_images(resume, call, options, calibrated_run, tmp_path):
    loaded = calibrated_run / "quantized.safetensors"
    succeeded(call(SCRIPT, *options, *W4A8, "--cali_ckpt", loaded, *resume, "-l", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(calibrated_run)
    assert manifest(tmp_path / "run")["config"]["ptq"]["action"] == "load"


@pytest.mark.thorough  # test_sample_diffusion_ddim
def test_resume_w_calibrates_activations_for_loaded_weights(call, options, calibrated_run, tmp_path):
    data = ("--cali_data_path", calibrated_run / "calibration_data.pt")
    loaded = ("--resume_w", "--cali_ckpt", calibrated_run / "quantized.safetensors")
    succeeded(call(SCRIPT, *options, *W4A8, *FEW, *loaded, *data, "-l", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(calibrated_run)
    assert all(n.startswith("activations ") for n in manifest(tmp_path / "run")["reconstruction_errors"])


@pytest.mark.thorough  # test_sample_diffusion_ddim
def test_weights_alone_from_the_same_checkpoint(call, options, calibrated_run, tmp_path):
    loaded = ("--ptq", "--weight_bit", 4, "--cali_ckpt", calibrated_run / "quantized.safetensors")
    succeeded(call(SCRIPT, *options, *loaded, "-l", tmp_path / "run"))
    assert manifest(tmp_path / "run")["activation_quantizers"]["total"] == 0
    assert image_bytes(tmp_path / "run") != image_bytes(calibrated_run)


@pytest.mark.parametrize(
    ("more", "weights", "activations"),
    [
        ((), "mse", "mse"),
        (("--a_min_max",), "mse", "max"),
        (("--a_min_max", "--a_range", "max"), "mse", "max"),
        (("--quant_mode", "linear"), "max", "max"),  # the papers' baseline is min-max in every family
        (("--method", "linear", "--a_range", "mse"), "max", "mse"),
    ],
)
def test_ranges(more, weights, activations, call, options):
    quant = json.loads(succeeded(call(SCRIPT, *options, *W4A8, *more, "--dry-run")).out)["ptq"]["quant"]
    assert (quant["weight_range"], quant["act_range"]) == (weights, activations)


# --- Published commands, their placeholders filled in

RUN = "-r models/ldm/{}/model.ckpt -n 20 --batch_size 10 -c {} -e {} --seed 41 --ptq --weight_bit {{bits}} "
BEDROOM = RUN.format("lsun_beds256", 200, "1.0")
CHURCH = RUN.format("lsun_churches256", 400, "0.0")
LOADED = "-l out --cali_ckpt quantized.pth"
CALIBRATED = "--quant_mode qdiff --cali_st 20 --cali_batch_size 32 --cali_n 256 "
PUBLISHED = {
    "bedroom weights": BEDROOM + LOADED,
    "bedroom activations": BEDROOM + "--quant_act --act_bit 8 --a_sym " + LOADED,
    "church weights": CHURCH + LOADED,
    "church activations": CHURCH + "--quant_act --act_bit 8 " + LOADED,
    "bedroom calibration": BEDROOM
    + CALIBRATED
    + "--quant_act --act_bit 8 --a_sym --a_min_max --running_stat --cali_data_path data.pt -l out",
    "church calibration": CHURCH + CALIBRATED + "--quant_act --act_bit 8 --cali_data_path data.pt -l out",
    "bedroom resumed": BEDROOM + CALIBRATED + "--quant_act --act_bit 8 --resume " + LOADED,
    "church resumed weights": CHURCH + CALIBRATED + "--quant_act --resume_w --rs_sm_only --verbose --cond " + LOADED,
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_resolve_without_weights(name, bits, call, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(PUBLISHED[name].format(bits=bits))
    outcome = succeeded(call(SCRIPT, *words, "--dry-run"))
    church = "church" in name
    assert outcome.err.count("\n") == church and ("500 steps are taken" in outcome.err) is church
    config = json.loads(outcome.out)
    shape = [4, 32, 32] if church else [3, 64, 64]
    assert (config["latent_shape"], config["num_images"], config["seed"]) == (shape, 20, 41)
    steps, eta = (400, 0.0) if church else (200, 1.0)
    assert (config["sampler"]["steps"], config["sampler"]["eta"]) == (steps, eta)
    plan = config["ptq"]
    assert plan["quant"]["weight_bits"] == bits
    assert plan["quant"]["act_bits"] == (8 if "--quant_act" in words else None)
    action = "activations" if "weights" in name and "resumed" in name else "load"
    assert plan["action"] == ("calibrate" if "calibration" in name else action)
    assert plan["quant"]["act_range"] == ("max" if "--a_min_max" in words else "mse")
    if "calibration" in name:
        assert (plan["steps"], plan["per_step"], plan["recipe"]["iterations"]) == (20, 256, 20000)


BARE = ("-r", "-n", "-c", "-e", "-l")  # the published parser lets these stand without a value


def test_defaults_are_the_published_ones(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the bundled model is found from anywhere
    config = json.loads(succeeded(call(SCRIPT, "--seed", 1, "--ptq", "--quant_act", "--dry-run")).out)
    assert config["weights"].endswith("models/ldm/digits_vq/model.safetensors")
    assert config["num_images"] == 50000
    assert (config["sampler"]["steps"], config["sampler"]["eta"]) == (50, 1.0)
    plan, recipe = config["ptq"], config["ptq"]["recipe"]
    assert (plan["steps"], plan["per_step"], plan["method"]) == (1, 1024, "qdiff")
    assert (recipe["iterations"], recipe["act_iterations"], recipe["batch_size"]) == (20000, 5000, 32)
    assert (recipe["lr_act"], recipe["p"], recipe["running_stat"]) == (4e-4, 2.4, False)
    assert [plan["quant"][k] for k in ("weight_bits", "act_bits", "softmax_bits")] == [8, 8, 8]
    bare = succeeded(call(SCRIPT, "--seed", 1, "--ptq", "--quant_act", *BARE, "--dry-run"))
    assert json.loads(bare.out) == config
    assert list(tmp_path.iterdir()) == []


# --- Bad input

CONFIG_ONLY = "base: configs/latent-diffusion/lsun_bedrooms-ldm-vq-4.yaml\n"
REFUSED = {
    "no eta so high": (("-e", 1.5), "eta is 1.5"),
    "no images": (("-n", 0), "--n_samples is 0"),
    "batch of none": (("--batch_size", 0), "--batch_size is 0"),
    "no steps": (("-c", 0), "0 sampling steps"),
    "more steps than trained": (("-c", 41), "41 sampling steps"),
    "negative seed": (("--seed", -1), "--seed is -1"),
    "two samplers": (("--dpm", "--vanilla_sample"), "--dpm and --vanilla_sample"),
    "two ranges": (("--ptq", "--quant_act", "--a_min_max", "--a_range", "mse"), "--a_min_max and --a_range mse"),
    "cali_st beyond the sampler": (("--ptq", "--cali_st", 5), "--cali_st 1 to 4"),
    "unknown option": (("--scale", 3), "--scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_numbers_are_one_sentence(name, call, options, tmp_path):
    more, says = REFUSED[name]
    assert says in call(SCRIPT, *options, *more, "-l", tmp_path / "run").error_line()
    assert list(tmp_path.iterdir()) == []


def test_seed_is_required(call, model):
    assert "--seed" in call(SCRIPT, "-r", model.weights).error_line()


def test_a_missing_checkpoint_says_where_to_get_it(call, tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG_ONLY)
    for named in (tmp_path, tmp_path / "model.ckpt"):
        line = call(SCRIPT, "-r", named, "--seed", 1, "-c", 4, "-l", tmp_path / "run").error_line()
        assert str(tmp_path / "model.ckpt") in line and "lsun_bedrooms.zip" in line and "zip archive" in line
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("named", ["none", "none/model.ckpt", "alone/model.ckpt"])
def test_a_checkpoint_without_its_config(named, call, tmp_path, model):
    (tmp_path / "alone").mkdir()
    shutil.copy(model.weights, tmp_path / "alone" / "model.ckpt")
    line = call(SCRIPT, "-r", tmp_path / named, "--seed", 1).error_line()
    assert "no config.yaml next to" in line and str(tmp_path / named) in line


@pytest.mark.parametrize("kind", ["class", "text"])
def test_conditional_models_have_scripts_of_their_own(kind, call, latent, tmp_path):
    line = call(SCRIPT, "-r", latent(kind).folder, *SAMPLER, "-l", tmp_path / "run").error_line()
    assert "conditional model" in line and "txt2img" in line


def test_files_of_another_family(call, tiny, model, tmp_path):
    shutil.copy(tiny.config, tmp_path / "config.yaml")
    shutil.copy(tiny.weights, tmp_path / "model.safetensors")
    line = call(SCRIPT, "-r", tmp_path, *SAMPLER, "-l", tmp_path / "run").error_line()
    assert "does not describe a latent diffusion model" in line
    shutil.copy(model.config, tmp_path / "config.yaml")  # now only the weights are a DDIM model's
    line = call(SCRIPT, "-r", tmp_path, *SAMPLER, "-l", tmp_path / "run").error_line()
    assert "not a latent diffusion checkpoint" in line
    assert not (tmp_path / "run").exists()


def test_other_options_do_not_continue_a_run(call, options, float_run):
    line = call(SCRIPT, *options, "-e", 0.25, "-l", float_run).error_line()
    assert "sampler.eta: 0.5 there, 0.25 here" in line
