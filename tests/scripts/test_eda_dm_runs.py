"""EDA-DM from end to end on tiny models of every script: allocation, calibration, continuing and loading."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from latent_models import TOKENS
from run_checks import image_bytes, lose_images, manifest, pixels, snapshot, succeeded
from safetensors.torch import load_file
from script_device import ON_DEVICE
from thorough import thorough_except

DDIM = "sample_diffusion_ddim"
COUNT, STEPS = 6, 4
# The published commands with small numbers.
PTQ = ("--ptq", "--split", "--weight_bit", 4, "--quant_act", "--act_bit", 8)
FEW = ("--calib_num_samples", COUNT, "--batch_samples", 4, "--cali_iters", 2, "--cali_batch_size", 4)
RECIPE = ("--calib_t_mode", "normal", "--calib_im_mode", "greedy", "--recon", "--lr_w", 0.1, "--add_loss", 0.8)
# The range search takes most of the time and has tests of its own; one run does it, for activations.
QUICK = ("--w_range", "max", "--a_range", "max")
LSUN = ("-n", 3, "--batch_size", 2, "-c", STEPS, "-e", 1.0, "--a_sym", "--dataset", "lsun")
SCRIPTS = {
    "sample_diffusion_ldm_bedroom": ("unconditional", LSUN),
    "sample_diffusion_ldm_church": ("unconditional", LSUN),
    "sample_diffusion_ldm_imagenet": (
        "class",
        ("--cond", "--no_grad_ckpt", "--ddim_steps", STEPS, "--n_samples", 3, "--n_batch", 2, "--sm_abit", 8),
    ),
    "sample_txt2img": (
        "text",
        ("--prompt", "two", "--plms", "--cond", "--ddim_steps", STEPS, "--n_samples", 3, "--n_batch", 2),
    ),
}
CALLS = {"sample_txt2img": STEPS + 1}  # PLMS begins with two calls


def assert_allocated(folder, calls, count=COUNT):
    """The manifest tells of every step; what was recorded agrees with it. Return the recording."""
    allocation = manifest(folder)["allocation"]
    assert set(allocation) == {"timesteps", "density", "variety", "weight", "counts"}
    assert all(len(values) == calls for values in allocation.values())
    assert sum(allocation["counts"]) == count and min(allocation["counts"]) >= 0
    assert allocation["timesteps"] == sorted(allocation["timesteps"], reverse=True)
    assert (folder / "allocation.png").stat().st_size > 1000
    recorded = torch.load(folder / "calibration_data.pt", weights_only=True)
    given = [(t, n) for t, n in zip(allocation["timesteps"], allocation["counts"], strict=True) if n]
    assert [(float(ts[0]), len(ts)) for ts in recorded["ts"]] == given
    assert all(len(set(ts.tolist())) == 1 for ts in recorded["ts"])
    return recorded


def assert_quantized(folder, float_folder):
    run = manifest(folder)
    assert run["status"] == "finished" and run["config"]["method"] == "eda-dm"
    assert run["activation_quantizers"]["total"] > 20 and run["activation_quantizers"]["silent"] == []
    assert 0 < run["noise_error"]["mse"] < run["noise_error"]["float_mean_square"]
    assert np.abs(pixels(folder) - pixels(float_folder)).mean() > 0
    assert not (folder / "calibration").exists()


# --- DDIM


@pytest.fixture(scope="module")
def ddim(tiny):
    sampler = ("--timesteps", STEPS, "--eta", 0, "--skip_type", "quad", "--max_images", 3, "--batch_size", 2)
    return *tiny.options, *sampler


@pytest.fixture(scope="module")
def ddim_float(call, ddim, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eda-dm") / "float"
    succeeded(call(DDIM, *ddim, "-l", folder))
    return folder


@pytest.fixture(scope="module")
def ddim_run(call, ddim, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eda-dm") / "run"
    options = (*ddim, *PTQ, *FEW, *RECIPE, "--a_sym", "--block_recon")
    succeeded(call(DDIM, *options, *QUICK, "-l", folder))
    return folder, (*options, *QUICK)


def test_ddim(ddim_run, ddim_float):
    folder, _ = ddim_run
    assert_quantized(folder, ddim_float)
    recorded = assert_allocated(folder, STEPS)
    assert set(recorded) == {"xs", "ts"} and sum(map(len, recorded["xs"])) == COUNT
    run = manifest(folder)
    assert len(run["reconstruction_errors"]) > 10 and {"recording", "calibration"} <= set(run["seconds"])
    assert "method eda-dm" in (folder / "run.log").read_text()
    assert "distribution tdac" in (folder / "run.log").read_text()


def test_repeating_the_command_redoes_nothing(call, ddim_run):
    folder, options = ddim_run
    before, allocation = snapshot(folder), manifest(folder)["allocation"]
    outcome = succeeded(call(DDIM, *options, "-l", folder))
    assert snapshot(folder) == before and manifest(folder)["allocation"] == allocation
    assert "calibrating" not in outcome.err and "recording" not in outcome.err


def test_killed_run_makes_the_missing_images_again(call, ddim_run, tmp_path):
    folder, options = ddim_run
    shutil.copytree(folder, tmp_path / "killed")
    lose_images(tmp_path / "killed", 2)
    succeeded(call(DDIM, *options, "-l", tmp_path / "killed"))
    assert image_bytes(tmp_path / "killed") == image_bytes(folder)


@pytest.mark.slow
@pytest.mark.parametrize("finished", thorough_except((0, 5), 5))
def test_calibration_killed_at_a_block_continues_there(finished, call, ddim_run, tmp_path, monkeypatch):
    from qdiff.calibration import journal, run

    folder, options = ddim_run
    kept, record, fit = [], journal.CalibrationJournal.record, run.fit_unit

    def killed(self, *unit):
        if len(kept) == finished:
            raise KeyboardInterrupt
        kept.append(unit)
        record(self, *unit)

    with monkeypatch.context() as patch:
        patch.setattr(journal.CalibrationJournal, "record", killed)
        assert call(DDIM, *options, "-l", tmp_path / "run").code == 130
    assert not (tmp_path / "run" / "quantized.safetensors").exists()

    fitted = []
    monkeypatch.setattr(run, "fit_unit", lambda unit, *rest: (fitted.append(unit.name), fit(unit, *rest))[1])
    outcome = succeeded(call(DDIM, *options, "-l", tmp_path / "run"))
    assert "recording" not in outcome.err, "the recording was there"
    assert len(fitted) == len(manifest(folder)["reconstruction_errors"]) - finished
    there, here = (load_file(f / "quantized.safetensors") for f in (folder, tmp_path / "run"))
    assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there)
    assert image_bytes(tmp_path / "run") == image_bytes(folder)
    # Whoever calibrated keeps how the samples fell, also when the first call was killed.
    assert manifest(tmp_path / "run")["allocation"] == manifest(folder)["allocation"]
    assert (tmp_path / "run" / "allocation.png").read_bytes() == (folder / "allocation.png").read_bytes()


@pytest.mark.slow
def test_sampling_from_the_finished_checkpoint(call, ddim, ddim_run, tmp_path):
    folder, _ = ddim_run
    loaded = (*PTQ, "--a_sym", "--cali_ckpt", folder / "quantized.safetensors")
    succeeded(call(DDIM, *ddim, *loaded, "--method", "eda-dm", "-l", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(folder)
    assert "allocation" not in manifest(tmp_path / "run")
    assert "--keep_ends" in call(DDIM, *ddim, *loaded, "-l", tmp_path / "other").error_line()
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_checkpoint_of_another_method_too(call, ddim, linear_run, tmp_path):
    """A method is how it was calibrated; with the options of its file any file is loaded."""
    loaded = ("--a_sym", "--no-keep_ends", "--cali_ckpt", linear_run / "quantized.safetensors")
    succeeded(call(DDIM, *ddim, *PTQ, *loaded, "--method", "eda-dm", "-l", tmp_path / "run"))


@pytest.mark.slow
def test_ptq4dm_and_the_search(call, ddim, ddim_float, tmp_path):
    options = ("--method", "ptq4dm", *PTQ, *FEW, "--no-recon", "--w_range", "max")
    succeeded(call(DDIM, *ddim, *options, "-l", tmp_path / "run"))
    run = manifest(tmp_path / "run")
    assert run["config"]["method"] == "ptq4dm" and run["reconstruction_errors"] == {}
    assert run["config"]["ptq"]["quant"]["act_range"] == "search"
    assert "allocation" not in run and not (tmp_path / "run" / "allocation.png").exists()
    recorded = torch.load(tmp_path / "run" / "calibration_data.pt", weights_only=True)
    assert sum(map(len, recorded["ts"])) == COUNT and run["activation_quantizers"]["silent"] == []


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "count"), [(1, 3), (4, 2), pytest.param(3, 1, marks=pytest.mark.thorough)])
def test_few_timesteps_and_few_samples(steps, count, call, ddim, tmp_path):
    """One step has no other to differ from; fewer samples than steps leave steps without any."""
    options = (*PTQ, *FEW, *RECIPE, *QUICK, "--calib_num_samples", count, "--timesteps", steps, "--max_images", 1)
    succeeded(call(DDIM, *ddim, *options, "-l", tmp_path / "run"))
    recorded = assert_allocated(tmp_path / "run", steps, count)
    assert sum(map(len, recorded["xs"])) == count
    assert manifest(tmp_path / "run")["activation_quantizers"]["silent"] == []


# --- Latent models


@pytest.fixture(scope="module")
def run_of(call, latent, tmp_path_factory):
    """``run_of(script, *more)``: the script's command in float or with ``more``; its folder."""
    made = {}

    def run(script, *more):
        if (script, more) not in made:
            kind, options = SCRIPTS[script]
            model = latent(kind)
            named = ("-r", model.folder, *ON_DEVICE) if kind == "unconditional" else model.options
            made[script, more] = tmp_path_factory.mktemp("eda-dm") / "run"
            succeeded(call(script, *named, *options, *more, "-l", made[script, more]))
        return made[script, more]

    return run


CALIBRATED = (*PTQ, *FEW, *RECIPE, *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("script", thorough_except(SCRIPTS, "sample_diffusion_ldm_imagenet"))
def test_latent_scripts(script, run_of):
    folder = run_of(script, *CALIBRATED)
    assert_quantized(folder, run_of(script))
    recorded = assert_allocated(folder, CALLS.get(script, STEPS))
    kind = SCRIPTS[script][0]
    context = {"unconditional": None, "class": (1, 32), "text": (TOKENS, 32)}[kind]
    conditions = set(recorded) - {"xs", "ts"}
    assert conditions == (set() if context is None else {"cs", "ucs"})
    for key in conditions:
        assert [tuple(c.shape) for c in recorded[key]] == [(len(x), *context) for x in recorded["xs"]]
    assert manifest(folder)["num_images"] == 3 and len(image_bytes(folder)) == 3
    plan = manifest(folder)["config"]["ptq"]
    assert plan["quant"]["act_symmetric"] is (kind != "unconditional")


@pytest.mark.slow
def test_sampling_from_a_finished_latent_checkpoint(run_of):
    script = "sample_diffusion_ldm_imagenet"
    source = run_of(script, *CALIBRATED)
    loaded = run_of(script, *PTQ, "--method", "eda-dm", "--cali_ckpt", source / "quantized.safetensors")
    assert image_bytes(loaded) == image_bytes(source)


@pytest.mark.slow
def test_guidance_1_records_the_condition_alone(run_of):
    folder = run_of("sample_diffusion_ldm_imagenet", *CALIBRATED, "--scale", 1.0)
    recorded = assert_allocated(folder, STEPS)
    assert set(recorded) == {"xs", "ts", "cs"}
    assert f"on {COUNT} samples" in (folder / "run.log").read_text()
    both = run_of("sample_diffusion_ldm_imagenet", *CALIBRATED)
    assert f"on {2 * COUNT} samples" in (both / "run.log").read_text()


@pytest.mark.thorough  # ldm/test_latent_unet: of outputs and gradients
def test_gradient_checkpointing_does_not_change_the_calibration(run_of):
    """The text model recomputes its blocks by default; --no_grad_ckpt keeps them."""
    files = [
        load_file(run_of("sample_txt2img", *CALIBRATED, *more) / "quantized.safetensors")
        for more in ((), ("--no_grad_ckpt",))
    ]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", thorough_except(("eda-dm", "qdiff"), "eda-dm"))
def test_another_calibration_seed_sees_other_images_and_draws_the_same(method, call, ddim, tmp_path):
    """The calibration set and its batches change, what is sampled from (x_T) does not."""
    recorded, drawn = [], FEW if method == "eda-dm" else ("--cali_st", 2, "--cali_n", 3, "--cali_iters", 2)
    for seed in (None, 3, 3):
        folder = tmp_path / f"{len(recorded)}"
        words = () if seed is None else ("--cali_seed", seed)
        succeeded(call(DDIM, *ddim, *PTQ[:-3], *drawn, *QUICK, "--method", method, *words, "-l", folder))
        recorded.append(torch.cat(list(torch.load(folder / "calibration_data.pt", weights_only=True)["xs"])))
    assert recorded[1].shape == recorded[2].shape and torch.equal(recorded[1], recorded[2])
    assert not torch.isin(recorded[0], recorded[1]).any()
    assert manifest(tmp_path / "1")["config"]["seed"] == manifest(tmp_path / "0")["config"]["seed"]
