"""Repeating the DDIM sampling command continues its run: what is there is kept, what is missing is made the same."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from ddim_runs import SAMPLER, SCRIPT
from run_checks import image_bytes, lose_images, manifest, snapshot, succeeded
from safetensors.torch import load_file, save_file


def test_second_call_redoes_nothing(call, calibrated_run):
    folder, options = calibrated_run
    before, seconds = snapshot(folder), manifest(folder)["seconds"]
    outcome = succeeded(call(SCRIPT, *options, "--save-npz", "-l", folder))
    assert snapshot(folder) == before
    assert manifest(folder)["seconds"] == seconds
    assert "calibrating" not in outcome.err and "recording" not in outcome.err
    assert manifest(folder)["status"] == "finished"


@pytest.mark.parametrize("kind", ["float", "qdiff"])
def test_killed_run_makes_only_the_missing_images_again(kind, call, tiny, float_run, calibrated_run, tmp_path):
    source, options = (float_run, (*tiny.options, *SAMPLER)) if kind == "float" else calibrated_run
    folder = tmp_path / "killed"
    shutil.copytree(source, folder)
    wanted = image_bytes(folder)
    lose_images(folder, 1, 2, 4)
    (folder / "samples.npz").unlink()
    kept = {i: (folder / "img" / f"{i:05d}.png").stat().st_mtime_ns for i in (0, 3)}

    outcome = succeeded(call(SCRIPT, *options, "--save-npz", "-l", folder))
    assert image_bytes(folder) == wanted
    assert {i: (folder / "img" / f"{i:05d}.png").stat().st_mtime_ns for i in (0, 3)} == kept
    assert (folder / "grid.png").read_bytes() == (source / "grid.png").read_bytes()
    assert manifest(folder)["status"] == "finished"
    assert "calibrating" not in outcome.err
    if kind == "qdiff":
        assert manifest(folder)["activation_quantizers"]["silent"] == []


@pytest.mark.slow
def test_calibration_killed_at_a_block_continues_there(call, calibrated_run, tmp_path, monkeypatch):
    """The blocks finished before the kill are not fitted again, and the checkpoint is the uninterrupted one."""
    from qdiff.calibration import journal, run

    folder, options = calibrated_run
    finished, record, fit = [], journal.CalibrationJournal.record, run.fit_unit

    def killed_at_the_fourth(self, *unit):
        if len(finished) == 3:
            raise KeyboardInterrupt
        finished.append(unit)
        record(self, *unit)

    with monkeypatch.context() as patch:
        patch.setattr(journal.CalibrationJournal, "record", killed_at_the_fourth)
        outcome = call(SCRIPT, *options, "-l", tmp_path / "run")
    assert outcome.code == 130 and "interrupted" in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "run" / "quantized.safetensors").exists()

    fitted = []

    def counted(unit, objective, settings, *rest):
        fitted.extend([unit.name] if settings.lr_rounding is not None else [])
        return fit(unit, objective, settings, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit_unit", counted)
        succeeded(call(SCRIPT, *options, "-l", tmp_path / "run"))
    everything = [n for n in manifest(folder)["reconstruction_errors"] if n.startswith("weights ")]
    assert len(fitted) == len(everything) - 3
    there, here = load_file(folder / "quantized.safetensors"), load_file(tmp_path / "run" / "quantized.safetensors")
    assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there)
    assert image_bytes(tmp_path / "run") == image_bytes(folder)
    # Those of blocks that were finished before the kill too.
    assert manifest(tmp_path / "run")["reconstruction_errors"] == manifest(folder)["reconstruction_errors"]


def test_memory_budget_may_change_when_a_run_continues(call, calibrated_run):
    """It does not change the result, and whoever ran out of memory must be able to continue with less."""
    folder, options = calibrated_run
    succeeded(call(SCRIPT, *options, "--save-npz", "--memory_budget", 1, "-l", folder))


def test_other_options_do_not_continue_a_run(call, tiny, float_run):
    before = snapshot(float_run)
    outcome = call(SCRIPT, *tiny.options, *SAMPLER, "--seed", 8, "-l", float_run)
    line = outcome.error_line()
    assert "seed: 7 there, 8 here" in line and "--logdir" in line
    assert snapshot(float_run) == before


def test_replaced_weights_do_not_continue_a_run(call, tiny, tmp_path):
    """The same path with other content would give a folder of two models' images."""
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tiny.weights, weights)
    options = ("--config", tiny.config, "--ckpt", weights, "--timesteps", 1, "--max_images", 2, "-l", tmp_path / "run")
    succeeded(call(SCRIPT, *options))
    (tmp_path / "run" / "img" / "00001.png").unlink()
    save_file({k: v * 0.5 for k, v in load_file(tiny.weights).items()}, weights)
    line = call(SCRIPT, *options).err.splitlines()[-1]
    assert line.startswith("error: ") and str(weights) in line and "--logdir" in line
    assert not (tmp_path / "run" / "img" / "00001.png").exists()


def test_run_that_was_out_of_memory_continues_with_smaller_batches(call, tiny, float_run, tmp_path, monkeypatch):
    from ddim.pipeline import DdimPipeline

    folder, limit, sample = tmp_path / "run", 2, DdimPipeline.sample

    def sampled(self, network, indices, *args, **kwargs):
        if len(indices) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return sample(self, network, indices, *args, **kwargs)

    monkeypatch.setattr(DdimPipeline, "sample", sampled)
    options = (*tiny.options, *SAMPLER, "-l", folder)
    outcome = call(SCRIPT, *options, "--batch_size", 4)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        "error: out of GPU memory while sampling (3.00 GiB were asked for); repeat the command with --batch_size 2 or "
        "less to continue: finished images are kept"
    )
    succeeded(call(SCRIPT, *options, "--batch_size", 2))
    assert image_bytes(folder) == image_bytes(float_run)
    assert manifest(folder)["gpu"] is None


def test_tf32_is_another_run(call, tiny, float_run):
    outcome = call(SCRIPT, *tiny.options, *SAMPLER, "--tf32", "-l", float_run)
    assert "other options (tf32: None there, True here)" in outcome.error_line()
    config = json.loads(succeeded(call(SCRIPT, *tiny.options, *SAMPLER, "--tf32", "--dry-run")).out)
    without = json.loads(succeeded(call(SCRIPT, *tiny.options, *SAMPLER, "--dry-run")).out)
    assert config == {**without, "tf32": True} and "tf32" not in without
