"""Noise correction from the command line: collected, used, continued, taken from a file, and refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from ddim_runs import DATA, SCRIPT, W4A8
from exact_runtimes import require_runtimes
from run_checks import image_bytes, largest_difference, lose_images, manifest, snapshot, succeeded
from thorough import thorough_except

from qdiff.cli.noise_correction import RunCorrection
from qdiff.cli.options.noise_correction import CorrectionPlan
from qdiff.cli.processes import precision_on
from qdiff.errors import UserError

FILE = "noise_correction.json"
SAMPLER = ("--timesteps", 4, "--max_images", 3, "--batch_size", 2, "--seed", 7)
LINEAR = (*W4A8, *DATA, "--quant_mode", "linear")
CORRECTED = ("--noise_correction", "d2", "--correction_samples", 3)
NOISY = ("--eta", 1)
GREY_LEVELS = 1


@pytest.fixture(scope="module")
def plain(call, one_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    succeeded(call(SCRIPT, *one_level.options, *SAMPLER, *LINEAR, *NOISY, "-l", folder))
    return folder


@pytest.fixture(scope="module")
def loaded(one_level, plain):
    """The options of runs that load the checkpoint of `plain`."""
    return *one_level.options, *SAMPLER, *W4A8, "--cali_ckpt", plain / "quantized.safetensors"


@pytest.fixture(scope="module")
def corrected(call, one_level, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrected")
    words = (*one_level.options, *SAMPLER, *LINEAR, *NOISY, *CORRECTED, "-l", folder)
    succeeded(call(SCRIPT, *words))
    return folder, words


def test_a_run_collects_once(corrected, plain, call):
    folder, words = corrected
    held, run = json.loads((folder / FILE).read_text()), manifest(folder)
    assert held["timesteps"] == [750, 500, 250, 0] and held["for"]["eta"] == 1.0 and held["for"]["scale"] == 1.0
    assert run["config"]["noise_correction"] == {"kind": "d2", "per": "tensor", "samples": 3}
    assert run["noise_correction"]["kind"] == "d2" and run["noise_correction"]["held_out"] == held["held_out"]
    assert run["noise_correction"]["network_calls"] == 4 and run["files"]["noise correction"]["path"].endswith(FILE)
    assert run["activation_quantizers"]["silent"] == [] and run["seconds"]["noise correction"] > 0
    assert image_bytes(folder) != image_bytes(plain)
    assert run["noise_error"] == manifest(plain)["noise_error"], "the network itself is the same"

    wanted, before = image_bytes(folder), snapshot(folder)
    lose_images(folder, 2)  # the last batch, as it was: another number of rows has other last bits on some CPUs
    outcome = succeeded(call(SCRIPT, *words))
    assert image_bytes(folder) == wanted and "collecting" not in outcome.err
    after = snapshot(folder)
    assert all(
        after[name] == before[name] for name in (FILE, "quantized.safetensors", "img/00000.png", "img/00001.png")
    )


def test_a_lost_file_is_collected_again(corrected, call):
    folder, words = corrected
    before = (folder / FILE).read_bytes()
    (folder / FILE).unlink()
    lose_images(folder, 0, 1)
    outcome = succeeded(call(SCRIPT, *words))
    assert "collecting" in outcome.err and (folder / FILE).read_bytes() == before


def test_a_file_that_changed_is_refused(corrected, call):
    folder, words = corrected
    before = (folder / FILE).read_text()
    try:
        (folder / FILE).write_text(before.replace('"seed": 7', '"seed": 8'))
        assert "has changed since the run" in call(SCRIPT, *words).err
    finally:
        (folder / FILE).write_text(before)


def test_from_the_file_of_another_run(corrected, loaded, call, tmp_path):
    """A file of a run with the same checkpoint gives the images of that run."""
    words = (*loaded, *NOISY, "--correction_path", corrected[0] / FILE, "-l", tmp_path)
    succeeded(call(SCRIPT, *words))
    assert image_bytes(tmp_path) == image_bytes(corrected[0])
    assert manifest(tmp_path)["noise_correction"]["samples"] == 3 and not (tmp_path / FILE).exists()


def test_the_correction_belongs_to_what_it_was_collected_with(corrected, loaded, one_level, call, tmp_path):
    there = ("--correction_path", corrected[0] / FILE)
    for words, message in (
        ((*loaded, *there), "was collected with eta 1.0, not 0.0"),
        ((*loaded, *NOISY, *there, "--timesteps", 5), "was collected with steps 4, not 5"),
        ((*loaded, *there, "--sample_type", "ddpm_noisy"), "was collected with sampler ddim, not ddpm_noisy"),
        ((*loaded, *NOISY, *there, "--noise_correction", "ptqd"), "has kind d2, not --noise_correction ptqd"),
        ((*loaded, *NOISY, "--correction_path", tmp_path / "none.json"), "none.json does not exist"),
        ((*loaded, *NOISY, "--correction_path", one_level.weights), "is not a noise correction"),
        ((*one_level.options, *SAMPLER, *NOISY, *LINEAR, *there), "give that with --cali_ckpt PATH"),
        ((*one_level.options, *SAMPLER, *NOISY, *there), "--correction_path has no meaning without --ptq"),
    ):
        assert message in call(SCRIPT, *words, "-l", tmp_path / "run").error_line()
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_checkpoint(corrected, one_level, call, tmp_path):
    succeeded(call(SCRIPT, *one_level.options, *SAMPLER, *LINEAR, "--w_range", "mse", "-l", tmp_path / "other"))
    words = (*one_level.options, *SAMPLER, *W4A8, *NOISY, "--cali_ckpt", tmp_path / "other" / "quantized.safetensors")
    outcome = call(SCRIPT, *words, "--correction_path", corrected[0] / FILE, "-l", tmp_path / "run")
    assert "for another quantized checkpoint" in outcome.error_line()


def test_a_file_of_another_precision(corrected, loaded, call, tmp_path):
    """Refused before anything is loaded; a file from before, which does not say it, is taken."""
    held = json.loads((corrected[0] / FILE).read_text())
    assert held["for"]["precision"] == "float32"
    held["for"]["precision"] = "float16"
    (tmp_path / FILE).write_text(json.dumps(held))
    words = (*loaded, *NOISY, "--correction_path", tmp_path / FILE, "-l", tmp_path / "run")
    assert "was collected with precision float16, not float32" in call(SCRIPT, *words).error_line()
    assert not (tmp_path / "run").exists()
    del held["for"]["precision"]
    (tmp_path / FILE).write_text(json.dumps(held))
    succeeded(call(SCRIPT, *words))
    assert image_bytes(tmp_path / "run") == image_bytes(corrected[0])


def test_autocast_is_half_precision_on_a_gpu_alone():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert precision_on(gpu, "autocast") == "float16"
    for device, precision in ((cpu, "autocast"), (cpu, "full"), (gpu, "full"), (gpu, None)):
        assert precision_on(device, precision) == "float32"


@pytest.mark.slow
def test_a_file_for_a_checkpoint_whose_widths_were_chosen(call, one_level, tmp_path):
    """The options of the run that loads it do not name them: they are the checkpoint's."""
    model = (*one_level.options, *SAMPLER, *NOISY)
    chosen = ("--target_bits", 5, "--sensitivity", "sqnr", "--sensitivity_samples", 2)
    words = (*model, *LINEAR, *chosen, *CORRECTED, "-l", tmp_path / "run")
    succeeded(call(SCRIPT, *words))
    wanted = image_bytes(tmp_path / "run")
    widths = json.loads((tmp_path / "run" / FILE).read_text())["for"]["layer_widths"]
    assert len(set(widths.values())) > 1
    lose_images(tmp_path / "run", 0, 1)
    assert "collecting" not in succeeded(call(SCRIPT, *words)).err

    loaded = (*model, *W4A8, "--cali_ckpt", tmp_path / "run" / "quantized.safetensors")
    succeeded(call(SCRIPT, *loaded, "--correction_path", tmp_path / "run" / FILE, "-l", tmp_path / "loaded"))
    assert image_bytes(tmp_path / "loaded") == wanted


def test_refused_where_it_cannot_be_right(one_level, call, tmp_path):
    options = (*one_level.options, *SAMPLER, *CORRECTED, "-l", tmp_path / "run")
    dynamic = (*W4A8, "--quant_mode", "dynamic", "--method", "linear", *DATA)
    assert "--noise_correction has no meaning without --ptq" in call(SCRIPT, *options).error_line()
    assert "contradict each other, because the error" in call(SCRIPT, *options, *dynamic, "--modulate").error_line()
    assert not (tmp_path / "run").exists()
    plan = SimpleNamespace(action="load")
    with pytest.raises(UserError, match="the loop of a diffusers pipeline has its own; leave --noise_correction out"):
        RunCorrection(CorrectionPlan("d2", "tensor", 3, None), plan, SimpleNamespace(sampler=None))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", thorough_except(("torch", "torch-int8"), "torch-int8"))
def test_a_packed_run_loads_the_float_network_only_to_collect(runtime, loaded, call, tmp_path, monkeypatch):
    words = (*loaded, "--noise_correction", "ptqd", "--correction_samples", 2, "-l", tmp_path / runtime)
    succeeded(call(SCRIPT, *words, "--runtime", runtime))
    wanted = image_bytes(tmp_path / runtime)
    lose_images(tmp_path / runtime, 0, 1)
    monkeypatch.setattr("ddim.pipeline.load_float_weights", None)
    succeeded(call(SCRIPT, *words, "--runtime", runtime))
    assert image_bytes(tmp_path / runtime) == wanted
    monkeypatch.undo()
    succeeded(call(SCRIPT, *words[:-1], tmp_path / "simulated"))
    assert largest_difference(tmp_path / "simulated", tmp_path / runtime) <= GREY_LEVELS


@pytest.mark.slow
def test_an_onnx_runtime_samples_with_the_correction(corrected, plain, loaded, call, tmp_path):
    """It collects the statistics of the simulated run, and gives its images; without the correction they are others."""
    require_runtimes()
    runtime = ("--runtime", "onnxruntime")
    succeeded(call(SCRIPT, *loaded, *NOISY, *CORRECTED, *runtime, "-l", tmp_path / "run"))
    run = manifest(tmp_path / "run")
    assert run["config"]["runtime"] == "onnxruntime" and run["noise_correction"]["kind"] == "d2"
    assert (tmp_path / "run" / FILE).read_bytes() == (corrected[0] / FILE).read_bytes()
    assert largest_difference(tmp_path / "run", corrected[0]) <= GREY_LEVELS

    words = (*loaded, *NOISY, *runtime, "--onnx", tmp_path / "run" / "model.onnx")
    succeeded(call(SCRIPT, *words, "-l", tmp_path / "without"))
    assert largest_difference(tmp_path / "without", plain) <= GREY_LEVELS
    assert largest_difference(tmp_path / "run", tmp_path / "without") > GREY_LEVELS
    given = ("--correction_path", tmp_path / "run" / FILE)
    succeeded(call(SCRIPT, *words, *given, "-l", tmp_path / "given"))
    assert image_bytes(tmp_path / "given") == image_bytes(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [("ddpm_noisy",), ("dpm_solver", "--dpm_method", "singlestep")], ids=" ".join)
def test_other_samplers(sampler, loaded, call, tmp_path):
    words = ("--sample_type", *sampler, *CORRECTED, "--correction_per", "channel", "--sequence", "-l", tmp_path)
    succeeded(call(SCRIPT, *loaded, *words))
    assert len(json.loads((tmp_path / FILE).read_text())["timesteps"]) == 4
    assert manifest(tmp_path)["status"] == "finished"


@pytest.mark.slow
def test_after_guidance(latent, call, tmp_path):
    """PLMS calls the network twice in its first step, and both calls have their entry."""
    model = (*latent("class").options, "--n_samples", 2, "--seed", 7, "--sampler", "plms", "--ddim_steps", 4)
    words = (*model, "--scale", 3, *LINEAR, *CORRECTED, "--correction_per", "channel")
    succeeded(call("sample_diffusion_ldm_imagenet", *words, "-l", tmp_path))
    held = json.loads((tmp_path / FILE).read_text())
    assert held["for"]["scale"] == 3.0 and held["timesteps"] == [31, 21, 21, 11, 1]
    assert len(held["scale"][0]) == held["for"]["shape"][0] > 1
    assert held["held_out"]["corrected_mse"] < held["held_out"]["mse"]
