"""A run folder is continued: with more images, with damaged ones, and after values that are not finite."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from ddim_runs import IMAGES, SAMPLER, SCRIPT
from latent_models import FEW, GREY_LEVELS, W4A8
from PIL import Image
from run_checks import image_bytes, largest_difference, manifest, snapshot, succeeded
from thorough import thorough_except

CAPTIONS = "sample_txt2img"
STEPS = ("--ddim_steps", 4, "--seed", 7)
LATENT_STEPS = ("-c", 4, "--seed", 7)


# --- More images


@pytest.mark.slow
@pytest.mark.parametrize("quantized", thorough_except((False, True), False))
def test_more_samples_of_a_prompt_make_only_the_missing_images(quantized, call, latent, tmp_path):
    """Their number is also that of the prompts, and the last batch is not full."""
    more = (*W4A8, "--ptq", *FEW) if quantized else ()
    given = (*latent("text").options, *STEPS, "--prompt", "two", "--n_batch", 2, *more)
    run = tmp_path / "run"
    succeeded(call(CAPTIONS, *given, "--n_samples", 3, "-l", run))
    before = snapshot(run)
    assert succeeded(call(CAPTIONS, *given, "--n_samples", 6, "-l", run)).code == 0
    after = snapshot(run)
    assert {name: after[name] for name in before} == before and len(image_bytes(run)) == 6
    if not quantized:
        succeeded(call(CAPTIONS, *given, "--n_samples", 6, "-l", tmp_path / "at-once"))
        assert largest_difference(run, tmp_path / "at-once") <= GREY_LEVELS
    line = call(CAPTIONS, *given, "--n_samples", 2, "-l", run).err.splitlines()[-1]
    assert line.startswith("error: ") and "prompts" in line and len(image_bytes(run)) == 6


@pytest.mark.slow
def test_a_run_that_noted_a_calibration_prompt_for_each_image_goes_on(call, latent, tmp_path):
    given = (*latent("text").options, *STEPS, "--prompt", "two", "-l", tmp_path)
    succeeded(call(CAPTIONS, *given, "--n_samples", 2))
    state = manifest(tmp_path)
    state["config"]["calibration_prompts"] = ["two"] * 2
    (tmp_path / "run.json").write_text(json.dumps(state))
    succeeded(call(CAPTIONS, *given, "--n_samples", 3))
    assert len(image_bytes(tmp_path)) == 3
    line = call(CAPTIONS, *given, "--n_samples", 3, "--prompt", "three").err.splitlines()[-1]
    assert "calibration_prompts" in line


@pytest.fixture(scope="module")
def calibrated_prompts(call, latent, tmp_path_factory):
    """A calibrated run of a file of two prompts: the file, the run folder, and the options but for the folder."""
    folder = tmp_path_factory.mktemp("two-prompts")
    path, run = folder / "prompts.txt", folder / "run"
    given = (*latent("text").options, *STEPS, "--from-file", path, "--n_samples", 9, *W4A8, "--ptq", *FEW)
    path.write_text("two\nthree")
    succeeded(call(CAPTIONS, *given, "-l", run))
    return path, run, given


@pytest.fixture
def two_prompts(calibrated_prompts, tmp_path):
    """A copy of that run: the file of prompts, the folder, and the options that continue it."""
    path, run, given = calibrated_prompts
    path.write_text("two\nthree")
    shutil.copytree(run, tmp_path / "run")
    return path, tmp_path / "run", (*given, "-l", tmp_path / "run")


@pytest.mark.slow
def test_lines_added_to_a_prompt_file_are_more_images(call, two_prompts):
    path, run, given = two_prompts
    before = snapshot(run)
    path.write_text("two\nthree\nfour")
    succeeded(call(CAPTIONS, *given))
    after = snapshot(run)
    assert {name: after[name] for name in before} == before and len(image_bytes(run)) == 3
    assert manifest(run)["config"]["calibration_prompts"] == ["two", "three"]  # what it was calibrated with
    path.write_text("two\nfour\nfive\nsix")
    assert "other options" in call(CAPTIONS, *given).err.splitlines()[-1]


def test_lines_added_during_a_calibration_are_another_run(call, two_prompts):
    path, run, given = two_prompts
    state = manifest(run)
    del state["noise_error"]
    (run / "run.json").write_text(json.dumps(state))
    path.write_text("two\nthree\nfour")
    assert "calibration_prompts" in call(CAPTIONS, *given).err.splitlines()[-1]


# --- Damaged images


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def of_another_kind(path):
    Image.open(path).save(path, format="JPEG")


def of_another_size(path):
    Image.open(path).resize((5, 5)).save(path)


def of_another_mode(path):
    Image.open(path).convert("RGB").save(path)


def with_16_bits(path):
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(path)


def emptied(path):
    path.write_bytes(b"")


DAMAGES = [truncated, flipped, of_another_kind, of_another_size, of_another_mode, with_16_bits, emptied]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("noted", [True, False])  # the shape of the images, which runs from before do not have
def test_damaged_images_are_made_again(damage, noted, call, tiny, float_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(float_run, run)
    damage(run / "img" / "00003.png")
    if not noted:
        state = manifest(run)
        del state["image_shape"]
        (run / "run.json").write_text(json.dumps(state))
    outcome = succeeded(call(SCRIPT, *tiny.options, *SAMPLER, "-l", run))
    assert image_bytes(run) == image_bytes(float_run)
    assert "made again: 3" in outcome.err


def test_the_shape_of_the_images_is_learned_where_half_of_them_are_wrong(call, tiny, tmp_path):
    given = (*tiny.options, "--timesteps", 2, "--max_images", 2, "-l", tmp_path / "run")
    succeeded(call(SCRIPT, *given))
    before, state = image_bytes(tmp_path / "run"), manifest(tmp_path / "run")
    of_another_size(tmp_path / "run" / "img" / "00000.png")
    del state["image_shape"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(state))
    succeeded(call(SCRIPT, *given))
    assert image_bytes(tmp_path / "run") == before


# --- Values that are not finite


@pytest.fixture
def poisoned(monkeypatch):
    """``poisoned(value, row, call)`` has every float network give a value in one row from a call on."""
    from ddim.pipeline import DdimPipeline
    from ldm.pipeline import LatentPipeline

    patches = []

    def start(value: float, row: int, first_call: int) -> None:
        for kind in (DdimPipeline, LatentPipeline):
            load = kind.load

            def loaded(self, *args, load=load, **kwargs):
                load(self, *args, **kwargs)
                calls = []

                def poison(module, args, output):
                    calls.append(len(output))
                    # Every batch begins anew; guidance doubles it.
                    if len(calls) > first_call and row < len(output):
                        output = output.clone()
                        output[row] = value
                    return output

                self.network.register_forward_hook(poison)

            context = pytest.MonkeyPatch()
            context.setattr(kind, "load", loaded)
            patches.append(context)

    def stop() -> None:
        while patches:
            patches.pop().undo()

    start.stop = stop
    yield start
    stop()


RUNS = {
    "sample_diffusion_ddim": (None, ("--timesteps", 4, "--max_images", 5, "--seed", 7)),
    "sample_diffusion_ldm": ("unconditional", (*LATENT_STEPS, "-n", 5)),
    "sample_diffusion_ldm_bedroom": ("unconditional", (*LATENT_STEPS, "-n", 5)),
    "sample_diffusion_ldm_church": ("unconditional", (*LATENT_STEPS, "-n", 5)),
    "sample_diffusion_ldm_imagenet": ("class", (*STEPS, "--n_samples", 5)),
    "txt2img": ("text", (*STEPS, "--n_samples", 5, "--n_iter", 1, "--prompt", "two")),
    "sample_txt2img": ("text", (*STEPS, "--n_samples", 5, "--prompt", "two")),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("script", thorough_except(RUNS, "sample_diffusion_ddim", "txt2img"))
def test_good_images_beside_one_that_is_not_finite_are_kept(script, value, call, tiny, latent, poisoned, tmp_path):
    kind, more = RUNS[script]
    if kind is None:
        model = tiny.options
    else:
        model = latent(kind).options if kind != "unconditional" else ("-r", latent(kind).folder)
    given = (*model, *more, "--batch_size", 3, "-l", tmp_path / "run")
    # From the last call of the first batch on, its second image.
    poisoned(value, 1, 3)
    outcome = call(script, *given)
    line = outcome.err.splitlines()[-1]
    assert outcome.code == 2 and line.startswith("error: image 1 has values that are not finite"), outcome.err
    assert sorted(image_bytes(tmp_path / "run")) == ["00000.png", "00002.png"]
    assert manifest(tmp_path / "run")["status"] == "running"
    kept = snapshot(tmp_path / "run")
    poisoned.stop()
    succeeded(call(script, *given))
    after = snapshot(tmp_path / "run")
    assert {name: after[name] for name in kept} == kept and len(image_bytes(tmp_path / "run")) == IMAGES


def test_a_damaged_image_that_cannot_be_made_again_is_gone(call, tiny, poisoned, tmp_path):
    given = (*tiny.options, "--timesteps", 3, "--max_images", 2, "-l", tmp_path / "run")
    succeeded(call(SCRIPT, *given))
    truncated(tmp_path / "run" / "img" / "00001.png")
    poisoned(float("nan"), 0, 0)
    assert call(SCRIPT, *given).code == 2
    assert sorted(image_bytes(tmp_path / "run")) == ["00000.png"]


def test_a_finite_number_of_messages(tmp_path):
    """Thousands of bad images are named by the first of them."""
    from qdiff.cli.pending import sample_pending
    from qdiff.cli.processes import Processes
    from qdiff.cli.run_folder import RunFolder
    from qdiff.errors import UserError

    run = RunFolder(tmp_path / "run", {}, 50)
    run.open()
    with pytest.raises(UserError, match=r"image 0, 1, 2, 3, 4 and 45 more has"):
        sample_pending(
            run, lambda rows: torch.full((len(rows), 1, 2, 2), torch.nan), 50, Processes(torch.device("cpu"))
        )
