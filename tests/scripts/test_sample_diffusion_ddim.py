"""The sampling command from end to end: float, naive, calibrated and loaded; what it leaves and what it prints."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ddim_runs import FEW, IMAGES, SAMPLER, SCRIPT, W4A8
from golden_cases import GoldenCase
from PIL import Image
from run_checks import image_bytes, manifest, pixels, sha256, snapshot, succeeded
from safetensors.torch import load_file, save_file
from script_device import DEVICE, ON_DEVICE

# What W4A8 may move a pixel of the tiny model on average, in grey levels: 2.2 to 2.3 were seen; weights that do not
# belong to the model moved it by 18.
MEAN_GREY_LEVELS_LOST = 5.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


# --- What a run leaves behind


def test_float_run_writes_images_grid_and_array(float_run):
    names = [f"{i:05d}.png" for i in range(IMAGES)]
    assert list(image_bytes(float_run)) == names
    made = pixels(float_run)
    assert made.shape == (IMAGES, 8, 8)
    assert np.mean((made > 0) & (made < 255)) > 0.2  # not saturated: comparisons below see the network
    assert len({data for data in image_bytes(float_run).values()}) == IMAGES
    with np.load(float_run / "samples.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"][..., 0], made)
    with Image.open(float_run / "grid.png") as grid:
        assert grid.size == (3 * 65 - 1, 2 * 65 - 1)  # 5 images in 3 columns, 8 times enlarged, one pixel between


def test_manifest_of_a_float_run(float_run, tiny):
    run = manifest(float_run)
    assert run["status"] == "finished"
    assert run["config"]["method"] == "float" and run["config"]["ptq"] is None
    assert run["config"]["seed"] == 7
    assert run["config"]["sampler"]["timesteps"] == 4
    assert run["config"]["model"]["model"]["ch"] == 32
    assert run["num_images"] == IMAGES
    assert "--timesteps 4" in run["command"] and f"{SCRIPT}.py" in run["command"]
    assert run["files"] == {"float weights": {"path": str(tiny.weights), "sha256": sha256(tiny.weights)}}
    assert run["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert run["device"] == DEVICE
    assert run["seconds"]["sampling"] > 0
    assert run["peak_memory_bytes"][0]["ram"] > 1 << 26  # Python with torch takes more than 64 MiB
    assert "activation_quantizers" not in run


@pytest.mark.parametrize("kind", ["linear", "qdiff"])
def test_manifest_of_a_calibrated_run(kind, linear_run, calibrated_run):
    folder = linear_run if kind == "linear" else calibrated_run[0]
    run = manifest(folder)
    plan = run["config"]["ptq"]
    assert run["status"] == "finished"
    assert run["config"]["method"] == plan["method"] == kind
    assert plan["action"] == "calibrate"
    assert (plan["quant"]["weight_bits"], plan["quant"]["act_bits"], plan["quant"]["split_shortcut"]) == (4, 8, True)
    assert (plan["steps"], plan["per_step"]) == (2, 3)
    data = folder / "calibration_data.pt"
    assert run["files"]["calibration data"] == {"path": str(data), "sha256": sha256(data)}
    assert torch.load(data, weights_only=True)["xs"].shape == (2, 3, 1, 8, 8)
    assert run["activation_quantizers"]["total"] > 20
    assert run["activation_quantizers"]["silent"] == []
    assert {"recording", "calibration", "sampling"} <= set(run["seconds"])
    assert 0 < run["noise_error"]["mse"] < run["noise_error"]["float_mean_square"]
    assert run["stored_activations_peak_bytes"] > 0 or kind == "linear"
    assert bool(run["reconstruction_errors"]) == (kind == "qdiff")
    assert not (folder / "calibration").exists()  # the journal of finished blocks is gone
    assert f"method {kind}" in (folder / "run.log").read_text()


def test_quantized_images_are_near_float_but_not_equal(float_run, linear_run, calibrated_run, tiny, call, runs):
    truth = pixels(float_run)
    for folder in (linear_run, calibrated_run[0]):
        lost = np.abs(pixels(folder) - truth).mean()
        assert 0 < lost < MEAN_GREY_LEVELS_LOST
    # Planted: another network's weights.
    other = runs / "other.safetensors"
    scaled = {k: v * 3 if k.startswith("conv_out") else v for k, v in load_file(tiny.weights).items()}
    save_file(scaled, other)
    succeeded(call(SCRIPT, "--config", tiny.config, "--ckpt", other, *SAMPLER, "-l", runs / "other"))
    assert np.abs(pixels(runs / "other") - truth).mean() > MEAN_GREY_LEVELS_LOST


def test_checkpoint_is_small(calibrated_run, tiny):
    assert (calibrated_run[0] / "quantized.safetensors").stat().st_size < 0.25 * tiny.weights.stat().st_size


def test_sequence_writes_every_step(call, tiny, tmp_path):
    options = ("--timesteps", 2, "--max_images", 1, "--sequence")
    succeeded(call(SCRIPT, *tiny.options, *options, "-l", tmp_path / "run"))
    assert len(list((tmp_path / "run" / "sequence").glob("*.png"))) == 8 * 2


def test_run_folder_has_a_name_of_its_own_without_logdir(call, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        succeeded(call(SCRIPT, *tiny.options, "--timesteps", 1, "--max_images", 1, "--seed", seed))
    folders = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(folders) == 2 and all(name.startswith("tiny-float-") for name in folders)


# --- Loading


@pytest.mark.slow
@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_own_checkpoint_gives_the_calibrated_images(resume, call, tiny, calibrated_run, tmp_path):
    source = calibrated_run[0]
    options = ("--cali_ckpt", source / "quantized.safetensors", *resume, "-l", tmp_path / "run")
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *W4A8, "--a_sym", *options))
    assert image_bytes(tmp_path / "run") == image_bytes(source)
    files = manifest(tmp_path / "run")["files"]
    assert files["quantized checkpoint"]["sha256"] == sha256(source / "quantized.safetensors")
    assert not (tmp_path / "run" / "quantized.safetensors").exists()


@pytest.mark.slow
def test_weights_of_a_w4a8_checkpoint_alone_are_the_w4_run(call, tiny, calibrated_run, weights_only_run, tmp_path):
    """Weights are fitted before activations and with the same draws: leaving activations out gives the W4 images."""
    options = ("--ptq", "--weight_bit", 4, "--split", "--cali_ckpt", calibrated_run[0] / "quantized.safetensors")
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *options, "-l", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(weights_only_run)
    assert image_bytes(tmp_path / "run") != image_bytes(calibrated_run[0])
    assert manifest(tmp_path / "run")["activation_quantizers"]["total"] == 0


@pytest.mark.slow
def test_resume_w_calibrates_activations_for_loaded_weights(call, tiny, calibrated_run, weights_only_run, tmp_path):
    loaded, data = weights_only_run / "quantized.safetensors", calibrated_run[0] / "calibration_data.pt"
    options = (*W4A8, "--a_sym", *FEW, "--resume_w", "--cali_ckpt", loaded, "--cali_data_path", data)
    folder = tmp_path / "run"
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *options, "-l", folder))
    run = manifest(folder)
    assert run["config"]["ptq"]["action"] == "activations"
    assert all(name.startswith("activations ") for name in run["reconstruction_errors"])
    there, here = load_file(loaded), load_file(folder / "quantized.safetensors")
    assert all(torch.equal(there[k], here[k]) for k in there)  # the weights, untouched
    assert "act_delta" in here and "act_delta" not in there
    # W4 calibrated once and resumed is W4A8 calibrated at once: same weights, same data, same draws.
    assert image_bytes(folder) == image_bytes(calibrated_run[0])

    files = {
        "float weights": tiny.weights,
        "calibration data": data,
        "quantized checkpoint": loaded,
    }
    for role, path in files.items():
        assert run["files"][role] == {"path": str(path), "sha256": sha256(path)}
    before = snapshot(folder)
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *options, "-l", folder))
    assert snapshot(folder) == before
    for role, path in files.items():  # also after a second call
        assert manifest(folder)["files"][role]["path"] == str(path)


@pytest.mark.slow
def test_published_checkpoint_runs(call, tmp_path):
    """A file of the paper's code, with the options of its README."""
    golden = GoldenCase("ddim_w4a8_split")
    (tmp_path / "model.yml").write_text(json.dumps(golden.case["config"]))  # JSON is YAML
    save_file(golden.float_weights(), tmp_path / "float.safetensors")
    options = ("--config", tmp_path / "model.yml", "--ckpt", tmp_path / "float.safetensors", *ON_DEVICE)
    options += (*SAMPLER, *W4A8, "--a_sym", "--cali_ckpt", golden.path, "-l", tmp_path / "run")
    succeeded(call(SCRIPT, *options))
    assert pixels(tmp_path / "run").shape == (IMAGES, 16, 16, 3)
    assert manifest(tmp_path / "run")["files"]["quantized checkpoint"]["sha256"] == sha256(golden.path)


# --- Dry run and published commands

# The DDIM section of Q-Diffusion's README, its placeholders filled in.
README_WEIGHTS = (
    "--config configs/cifar10.yml --use_pretrained --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit {bits} "
    "--quant_mode qdiff --split -l out --cali_ckpt w{bits}.pth"
)
README_W_AND_A = (
    "--config configs/cifar10.yml --use_pretrained --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit {bits} "
    "--quant_mode qdiff --quant_act --act_bit 8 --a_sym --split -l out --cali_ckpt w{bits}a8.pth"
)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("command", [README_WEIGHTS, README_W_AND_A], ids=["weights", "weights-and-activations"])
def test_readme_commands_resolve(command, bits, call, tmp_path, monkeypatch):
    shutil.copytree(Path(__file__).parents[2] / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    outcome = succeeded(call(SCRIPT, *shlex.split(command.format(bits=bits)), "--dry-run"))
    config = json.loads(outcome.out)
    assert sorted(tmp_path.rglob("*")) == before
    assert outcome.err == ""
    quant, activations = config["ptq"]["quant"], command is README_W_AND_A
    assert config["method"] == "qdiff" and config["ptq"]["action"] == "load"
    assert config["ptq"]["checkpoint"] == (f"w{bits}a8.pth" if activations else f"w{bits}.pth")
    assert quant["weight_bits"] == bits and quant["split_shortcut"] is True
    assert quant["act_bits"] == (8 if activations else None) and quant["act_symmetric"] is activations
    assert config["sampler"]["skip_type"] == "quad" and config["sampler"]["timesteps"] == 100
    assert config["max_images"] == 50000 and config["seed"] == 1234


def test_dry_run_prints_what_the_manifest_keeps(call, calibrated_run):
    folder, options = calibrated_run
    outcome = succeeded(call(SCRIPT, *options, "-l", "never-made", "--dry-run"))
    assert json.loads(outcome.out) == manifest(folder)["config"]


def test_dry_run_needs_no_weights_data_or_device(call, tiny, tmp_path):
    missing = tmp_path / "missing"
    options = ("--config", tiny.config, "--ckpt", missing, "--cali_data_path", missing, "--device", "cuda:9")
    outcome = succeeded(call(SCRIPT, *options, *W4A8, "-l", tmp_path / "run", "--dry-run"))
    assert json.loads(outcome.out)["weights"] == str(missing)
    assert list(tmp_path.iterdir()) == []
