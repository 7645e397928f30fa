"""Measuring finished runs: what is kept in metrics.json, when it is made anew, and fidelity to the float run."""

from __future__ import annotations

import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from digit_runs import COUNT, write_run
from safetensors.torch import load_file, save_file

from qdiff.cli import measure as module
from qdiff.cli.measure import Measuring
from qdiff.cli.run_manifest import Manifest
from qdiff.errors import UserError
from qdiff.evaluation import features
from qdiff.evaluation.extractors import EXTRACTORS, create_extractor
from qdiff.evaluation.measure import measure
from qdiff.evaluation.reference import compute_reference, find_reference, load_reference, save_reference
from qdiff.evaluation.registry import METRICS
from qdiff.evaluation.subject import Subject
from qdiff.io.images import save_png
from qdiff.io.repository import REPOSITORY

NAME, REFERENCE = "digits-classifier", "digits32"
SAME = 1e-9  # relative: the same float64 arithmetic on the same features
DECIBELS = 1e-4  # torchmetrics takes the logarithm of the peak in float32


@pytest.fixture
def computed(monkeypatch):
    """What was computed, not read: the metrics of every measurement."""
    calls: list = []
    original = module.measure
    monkeypatch.setattr(module, "measure", lambda subject, names: calls.append(names) or original(subject, names))
    return calls


@pytest.fixture
def passes(monkeypatch):
    """How many images each pass of the feature network saw."""
    seen: list[int] = []
    original = features.extract_features
    monkeypatch.setattr(
        features, "extract_features", lambda images, *a, **k: seen.append(len(images)) or original(images, *a, **k)
    )
    return seen


@pytest.fixture
def run(tmp_path, digits):
    """``run(name, change, **manifest)`` writes a run of digits plus ``change`` and returns its folder."""

    def write(name: str, change: int | np.ndarray = 0, count: int = COUNT, **manifest):
        images = np.clip(digits[0][:count].astype(int) + change, 0, 255).astype(np.uint8)
        write_run(tmp_path / name, images, **manifest)
        return tmp_path / name

    return write


def measured(folder, metrics=("fid", "isc"), float_folder=None, reference=REFERENCE, weights=None, **options) -> dict:
    measuring = Measuring(NAME, weights, str(reference), metrics, **options)
    return measuring.run(folder, Manifest.read(folder / "run.json"), float_folder)


def newer(folder, than) -> None:
    os.utime(folder / "img", (than.stat().st_mtime + 1,) * 2)


# ---------------------------------------------------------------------- what is kept


def test_numbers_are_those_of_the_images(run, digits):
    folder = run("row")
    found = measured(folder, ("fid", "sfid", "isc", "kid", "prc"))
    extractor = create_extractor(NAME)
    reference = load_reference(REPOSITORY / "models/digits32_reference.npz", extractor)
    expected = measure(Subject(digits[0], reference, extractor, progress=False), ("fid", "sfid", "isc", "kid", "prc"))
    for key in ("fid", "sfid", "isc", "kid", "precision", "recall"):
        assert found[key] == pytest.approx(expected[key], rel=SAME), key
    assert json.loads((folder / "metrics.json").read_text()) == found


def test_all_metrics_of_features_share_one_pass(run, passes, digits):
    measured(run("row", labels=digits[1]), ("fid", "sfid", "isc", "kid", "prc", "fidelity"), run("float"))
    assert passes == [COUNT]


def test_second_measurement_reads(run, computed, digits):
    folder = run("row", labels=digits[1])
    first = measured(folder)
    written = (folder / "metrics.json").stat().st_mtime_ns
    assert computed == [["fid", "isc", "asked"]] and first["asked_share"] == 1.0
    computed.clear()
    assert measured(folder) == first and computed == []
    assert (folder / "metrics.json").stat().st_mtime_ns == written


def test_only_what_lacks_is_computed(run, computed, digits):
    folder, base = run("row", 3, labels=digits[1]), run("float")
    first = measured(folder)
    computed.clear()
    both = measured(folder, ("fid", "isc", "prc", "fidelity"), base)
    assert computed == [["prc", "fidelity"]]
    assert both.items() >= first.items() and {"precision", "recall", "psnr", "ssim"} <= both.keys()
    kept = json.loads((folder / "metrics.json").read_text())
    assert kept.pop("asked_share") == 1.0
    (folder / "metrics.json").write_text(json.dumps(kept))
    computed.clear()
    assert measured(folder)["asked_share"] == 1.0 and computed == [["asked"]]


def test_newer_images_are_measured_anew(run, computed, digits):
    folder = run("row", labels=digits[1])
    first = measured(folder)
    image = folder / "img" / "00000.png"
    image.unlink()
    save_png(np.zeros((32, 32, 3), np.uint8), image)
    newer(folder, folder / "metrics.json")
    computed.clear()
    second = measured(folder)
    assert computed == [["fid", "isc", "asked"]]
    assert second["asked_share"] == pytest.approx(1 - 1 / COUNT, rel=SAME)
    assert abs(second["fid"] - first["fid"]) > 1e-3


def test_another_reference_is_measured_anew(run, computed):
    folder = run("row")
    first = measured(folder)["fid"]
    computed.clear()
    second = measured(folder, reference="digits")["fid"]
    assert computed == [["fid", "isc"]] and abs(second - first) > 1e-3
    assert measured(folder)["fid"] == pytest.approx(first, rel=SAME)


@pytest.mark.parametrize("tells", [True, False], ids=["weights told", "weights not told"])
def test_other_weights_of_the_extractor_are_measured_anew(tells, run, computed, digits, tmp_path):
    folder, weights = run("row"), tmp_path / "other.safetensors"
    state = load_file(REPOSITORY / EXTRACTORS[NAME].weights)
    torch.manual_seed(0)
    save_file({k: v * (1 + torch.rand_like(v)) if v.is_floating_point() else v for k, v in state.items()}, weights)
    found = []
    for number, used in enumerate((None, weights)):
        reference = compute_reference(digits[0][:8], create_extractor(NAME, used), "eight digits", progress=False)
        if not tells:  # as in files of other projects: neither hash is known
            reference = dataclasses.replace(reference, weights_hash=None, images_hash=None)
        save_reference(reference, tmp_path / f"{number}.npz")
        found.append(measured(folder, reference=tmp_path / f"{number}.npz", weights=used)["isc"])
    assert computed == 2 * [["fid", "isc"]] and abs(found[0] - found[1]) > 1e-3


# ---------------------------------------------------------------------- fidelity


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean over images of 10·log10(255² / mean squared error), at most 100 dB."""
    error = ((ours.astype(float) - theirs.astype(float)) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return float(np.minimum(10 * np.log10(255**2 / error), 100).mean())


def test_fidelity_falls_with_what_is_changed(run, digits):
    base, images = run("float"), digits[0]
    found = [measured(run(f"{change}", change), ("fidelity",), base) for change in (0, 2, 20)]
    for change, values in zip((0, 2, 20), found, strict=True):
        changed = np.clip(images.astype(int) + change, 0, 255)
        assert values["psnr"] == pytest.approx(psnr(changed, images), abs=DECIBELS)
    assert found[0]["psnr"] == 100 and found[0]["ssim"] == pytest.approx(1, abs=1e-9) and found[0]["identical"] == COUNT
    assert found[1]["psnr"] > found[2]["psnr"] + 10 and found[1]["ssim"] > found[2]["ssim"]


def test_images_are_compared_in_order(run, digits):
    base, order = run("float"), np.roll(np.arange(COUNT), 1)
    moved = digits[0][order].astype(int) - digits[0]
    assert measured(run("moved", moved), ("fidelity",), base)["psnr"] < 20


def test_float_itself_has_no_fidelity(run, computed):
    found = measured(run("float"), ("fid", "fidelity"))
    assert computed == [["fid"]] and "psnr" not in found


def test_newer_float_images_are_compared_anew(run, computed):
    folder, base = run("row"), run("float")
    first = measured(folder, ("fid", "fidelity"), base)
    assert first["psnr"] == 100
    for image in (base / "img").iterdir():
        save_png(np.zeros((32, 32, 3), np.uint8), image)
    newer(base, folder / "metrics.json")
    computed.clear()
    second = measured(folder, ("fid", "fidelity"), base)
    assert computed == [["fidelity"]] and second["psnr"] < 20 and second["fid"] == first["fid"]


def test_only_the_first_images_are_compared(run, monkeypatch):
    monkeypatch.setattr(module, "COMPARED", 5)
    change = np.zeros((COUNT, 32, 32, 3), int)
    change[5:] = 50
    assert measured(run("row", change), ("fidelity",), run("float"))["psnr"] == 100
    change[4:] = 50
    assert measured(run("other", change), ("fidelity",), run("float"))["psnr"] < 90


# ---------------------------------------------------------------------- what can be measured


def test_few_images_go_without_the_metrics_that_need_more(run):
    found = measured(run("row", count=5), ("fid", "isc", "prc"))
    assert {"fid", "precision"} <= found.keys() and "isc" not in found


def test_a_reference_that_holds_too_little_is_told_at_once(tmp_path):
    bare = dataclasses.replace(find_reference("digits", create_extractor(NAME)), features=None, spatial=None)
    save_reference(bare, tmp_path / "bare.npz")
    for metric in ("sfid", "kid", "prc"):
        with pytest.raises(UserError, match=f"hold too little for {metric}"):
            Measuring(NAME, None, str(tmp_path / "bare.npz"), ("fid", metric))
    Measuring(NAME, None, str(tmp_path / "bare.npz"), ("fid", "isc"))


def test_clip_score_takes_the_prompts_of_the_run(run, monkeypatch):
    asked = []

    def score(subject):
        asked.append((subject.count, subject.prompts, subject.clip))
        return {"clip_score": 30.0}

    monkeypatch.setattr(module, "load_clip", lambda *names: SimpleNamespace(names=names))
    monkeypatch.setitem(METRICS, "clip", dataclasses.replace(METRICS["clip"], measure=score))
    prompts = [f"the digit {i}" for i in range(COUNT)]
    folder = run("row", config={"prompts": prompts})
    assert measured(folder, ("clip",), clip_model="tiny")["clip_score"] == 30.0
    assert asked == [(COUNT, prompts, SimpleNamespace(names=("tiny",)))]
    assert measured(folder, ("clip",), clip_model="tiny")["clip_score"] == 30.0 and len(asked) == 1
    measured(folder, ("clip",))
    assert asked[1][2] == SimpleNamespace(names=())  # another model: anew
    with pytest.raises(UserError, match="has no prompts"):
        measured(run("other"), ("clip",))
