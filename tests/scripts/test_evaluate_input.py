"""What evaluate.py refuses: one sentence, exit code 2, before any work and with nothing written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from digit_sets import PROMPTS, digits, write_folder, write_npz, write_run
from safetensors.torch import save_file

from qdiff.cli import evaluate as module
from qdiff.evaluation import reference_set, subject
from qdiff.evaluation.extractors import create_extractor
from qdiff.evaluation.reference import compute_reference, save_reference

NAME = "digits-classifier"
REAL, MADE = digits(0, 12), digits(12, 24)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "made", MADE)
    write_folder(tmp_path / "real", REAL)
    write_run(tmp_path / "run", MADE)


@pytest.fixture
def refused(call, tmp_path, monkeypatch):
    """``refused(*words)`` returns the sentence; nothing was computed, and nothing written."""

    def work(*_, **__):
        pytest.fail("there was work before the error")

    def state() -> list:
        return sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))

    def run(*words) -> str:
        before = state()
        with monkeypatch.context() as patch:
            for owner in (subject, reference_set):
                patch.setattr(owner, "cached_features", work)
            patch.setattr(module, "measure", work)
            line = call("evaluate", *words).error_line()
        assert state() == before
        return line

    return run


BAD_WORDS = {
    "no samples": ((), "required"),
    "three paths": (("a", "b", "c"), "3 paths"),
    "nothing to compare with": (("made",), "nothing to compare with"),
    "samples that are not there": (("digits32", "none"), "none"),
    "samples without images": (("digits32", "none-here"), "hold no image"),
    "folder of several runs": (("digits32", "."), "holds 5 run folders"),
    "run whose images were deleted": (("digits32", "grid-alone"), "without images"),
    "samples of another kind": (("digits32", "text.npz"), "holds no array arr_0"),
    "samples of another type": (("digits32", "floats.npz"), "must be uint8"),
    "reference that is not there": (("none", "made", "--extractor", NAME), "no reference statistics 'none'"),
    "reference folder without images": (("none-here", "made", "--extractor", NAME), "hold no image"),
    "reference file that is not there": (("none.npz", "made", "--extractor", NAME), "none.npz"),
    "reference of another kind": (("text.npz", "made", "--extractor", NAME), "holds no array arr_0"),
    "unknown metric": (("real", "made", "--metrics", "fid,ssim"), "no 'ssim'; choose from fid, sfid, isc, kid, prc"),
    "no metric": (("real", "made", "--metrics", ""), "--metrics has no ''; choose from"),
    "metric without a reference": (("made", "--metrics", "fid", "--extractor", NAME), "name the reference"),
    "too few for a metric": (("digits32", "few", "--metrics", "fid,isc"), "isc needs 10"),
    "one image": (("digits32", "one"), "fid needs 2"),
    "reference of three": (("few", "made", "--extractor", NAME), "few has 3 images"),
    "unknown extractor": (("real", "made", "--extractor", "vgg"), "no feature extractor 'vgg'"),
    "extractor of other statistics": (("digits32", "made", "--extractor", "inception-v3-compat"), "are missing"),
    "weights that are not there": (("digits32", "made", "--extractor-weights", "none"), "no file none"),
    "Inception's weights": (("real", "made"), "--extractor-weights PATH"),
    "unknown device": (("digits32", "made", "--device", "abacus"), "--device abacus"),
    "batches of nothing": (("digits32", "made", "--batch_size", "0"), "--batch_size is 0"),
    "unknown protocol": (("digits32", "made", "--protocol", "tf"), "invalid choice"),
    "cache in a file": (("digits32", "made", "--cache", "text.npz"), "cannot be written"),
    "json in a folder": (("digits32", "made", "--json", "made"), "made cannot be written"),
    "json in a file": (("digits32", "made", "--json", "text.npz/a.json"), "cannot be written"),
    "damaged manifest": (("digits32", "damaged"), "is not a run's manifest"),
    "manifest of another kind": (("digits32", "strange"), "is not a run's manifest"),
    "no float run": (("run", "--against", "none"), "none"),
    "other seed": (("run", "--against", "seed"), "run has seed 3 and seed has 4"),
    "other count": (("run", "--against", "few"), "has 12 images and few has 3"),
    "LPIPS without a float run": (
        ("digits32", "run", "--lpips-weights", "text.npz"),
        "--lpips-weights needs --against",
    ),
    "LPIPS weights that are not there": (("run", "--against", "run", "--lpips-weights", "a.pth"), "alexnet-owt"),
    "a float run and a metric alone": (
        ("run", "--against", "run", "--metrics", "kid", "--extractor", NAME),
        "name the",
    ),
    "a float run and no reference": (("none", "run", "--against", "run", "--extractor", NAME), "statistics 'none'"),
    "prompts of no run": (("made", "--clip"), "no prompts in a run.json"),
    "prompts that are not there": (("made", "--prompts", "none.txt"), "none.txt does not exist; check --prompts"),
    "too few prompts": (("made", "--prompts", "prompts.txt"), "5 prompts for the 12 images"),
    "too many prompts": (("few", "--prompts", "prompts.txt"), "5 prompts for the 3 images"),
    "CLIP that is not there": (("five", "--prompts", "prompts.txt"), "no CLIP model openai/clip-vit-large-patch14"),
    "CLIP folder that is not there": (("five", "--prompts", "prompts.txt", "--clip-model", "none"), "CLIP model none"),
}


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "floats.npz", MADE / 255)
    write_folder(tmp_path / "few", MADE[:3])
    write_folder(tmp_path / "one", MADE[:1])
    write_folder(tmp_path / "five", MADE[:5])
    write_run(tmp_path / "seed", MADE, seed=4)
    for name, text in (("damaged", "{"), ("strange", '{"config": []}')):
        write_run(tmp_path / name, MADE)
        (tmp_path / name / "run.json").write_text(text)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\u2028in\fone prompt", encoding="utf-8")
    (tmp_path / "none-here" / "below").mkdir(parents=True)
    shutil.rmtree(write_run(tmp_path / "grid-alone", MADE) / "img")
    write_folder(tmp_path / "grid-alone", MADE[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD_WORDS)
def test_bad_words_are_one_sentence(name, refused, bad_files):
    words, says = BAD_WORDS[name]
    assert says in refused(*words)


def test_statistics_of_another_network_are_refused(refused, tmp_path):
    real = torch.from_numpy(REAL).permute(0, 3, 1, 2)
    extractor = create_extractor(NAME)
    with torch.no_grad():
        next(extractor.parameters()).add_(0.1)
    save_file({k.removeprefix("classifier."): v for k, v in extractor.state_dict().items()}, tmp_path / "other")
    save_reference(compute_reference(real, extractor, "twelve", progress=False), tmp_path / "real.npz")
    assert "other weights" in refused("real.npz", "made", "--against", "made")
    assert "other weights" in refused("digits32", "made", "--extractor-weights", "other")


def test_images_of_another_size_are_refused(refused, tmp_path):
    write_run(tmp_path / "small", digits(12, 24, side=16))
    for words in (("run", "--against", "small"), ("digits32", "run", "--against", "small")):
        line = refused(*words)
        assert "32×32" in line and "16×16" in line


def test_a_failure_leaves_the_old_json(call, tmp_path):
    (tmp_path / "result.json").write_text("old")
    write_npz(tmp_path / "cut.npz", MADE)
    mixed = write_folder(tmp_path / "mixed", MADE)
    write_folder(tmp_path / "mixed", digits(0, 1, side=16))
    for words in (("digits32", mixed), ("digits32", "none")):
        assert call("evaluate", *words, "--json", "result.json").code == 2
        assert (tmp_path / "result.json").read_text() == "old"
    assert not list(tmp_path.rglob("*.part")) and not list((tmp_path / "cache").rglob("*.npz"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
