"""evaluate.py on real digits: which images are compared with which reference, by which protocol, and what is kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from digit_sets import PROMPTS, classes, digits, write_clip, write_folder, write_npz, write_run
from threadpoolctl import threadpool_limits

from qdiff.cli import evaluate as module
from qdiff.evaluation import features, reference, reference_set
from qdiff.evaluation.clip_score import clip_scores
from qdiff.evaluation.extractors import create_extractor
from qdiff.evaluation.features import extract_features
from qdiff.evaluation.image_sets import open_images
from qdiff.evaluation.measure import measure
from qdiff.evaluation.reference import compute_reference, find_reference, save_reference
from qdiff.evaluation.subject import Subject

NAME = "digits-classifier"
SAME = 1e-9  # relative: the same arithmetic on the same features
SCORE = 1e-6  # relative: float32 logits
ALL = ("fid", "sfid", "isc", "kid", "prc")
KEYS = {"fid", "sfid", "isc", "kid", "precision", "recall"}
REAL, MADE = digits(0, 40), digits(40, 70)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """A cache of its own; SciPy's BLAS does not heed OMP_NUM_THREADS set after its import."""
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    with threadpool_limits(1):
        yield


@pytest.fixture
def evaluate(call):
    """``evaluate(*words)`` returns the JSON of a run that succeeded."""

    def run(*words) -> dict:
        outcome = call("evaluate", *words, "--json", "-")
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return run


@pytest.fixture(scope="module")
def extractor():
    return create_extractor(NAME)


@pytest.fixture
def extracted(monkeypatch):
    """How many images each pass of a network saw."""
    seen = []
    original = features.extract_features
    monkeypatch.setattr(
        features, "extract_features", lambda images, *a, **k: seen.append(len(images)) or original(images, *a, **k)
    )
    return seen


def expected(made, real, extractor, metrics=ALL, **options) -> dict[str, float]:
    statistics = compute_reference(real, extractor, "real", progress=False)
    return measure(Subject(made, statistics, extractor, progress=False, **options), metrics)


def assert_same(found: dict, wanted: dict, keys=KEYS) -> None:
    for key in keys:
        assert found["metrics"][key] == pytest.approx(wanted[key], rel=SAME), key


# ---------------------------------------------------------------------- images against images


def test_two_npz_files_by_adms_protocol(evaluate, tmp_path, extractor):
    real, made = write_npz(tmp_path / "real.npz", REAL), write_npz(tmp_path / "made.npz", MADE)
    found = evaluate(real, made, "--extractor", NAME)
    assert_same(found, expected(MADE, REAL, extractor, adm_protocol=True))
    # Inception score over images in order: here one part of all.
    p = torch.softmax(extract_features(MADE, extractor, progress=False).logits.double(), 1).numpy()
    score = float(np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()))
    assert found["metrics"]["isc"] == pytest.approx(score, rel=SCORE)
    assert found["protocol"] == {
        "extractor": NAME, "inception_score": "parts of 5,000, in order", "left_out": []
    }  # fmt: skip
    assert found["samples"]["images"] == 30 and found["metrics"]["num_reference"] == found["reference"]["count"] == 40
    assert found["reference"]["given"] == str(real) and len(found["reference"]["weights_hash"]) == 64
    # What the tolerances break on: the other protocol, and the two exchanged.
    other = evaluate(real, made, "--extractor", NAME, "--protocol", "torch-fidelity")
    assert abs(other["metrics"]["isc"] - score) > 0.1 and other["protocol"]["inception_score"].startswith("10 parts")
    turned = evaluate(made, real, "--extractor", NAME)["metrics"]
    assert turned["precision"] == found["metrics"]["recall"] != turned["recall"]


def test_two_folders(evaluate, tmp_path, extractor):
    real, made = write_folder(tmp_path / "real", REAL), write_folder(tmp_path / "made", MADE)
    found = evaluate(real, made, "--extractor", NAME)
    assert_same(found, expected(MADE, REAL, extractor))
    assert found["protocol"]["inception_score"] == "10 parts, shuffled"
    adm = evaluate(real, made, "--extractor", NAME, "--protocol", "adm", "--batch_size", 7)
    npz = evaluate(*(write_npz(tmp_path / f"{p.name}.npz", x) for p, x in ((real, REAL), (made, MADE))),
                   "--extractor", NAME)  # fmt: skip
    # Pixels are the same; batches of 7 round otherwise.
    assert adm["samples"]["pixels_hash"] == npz["samples"]["pixels_hash"] == found["samples"]["pixels_hash"]
    assert adm["metrics"] == pytest.approx(npz["metrics"], rel=1e-4)


def test_metrics_that_were_asked_for(evaluate, tmp_path):
    real, made = write_folder(tmp_path / "real", REAL), write_folder(tmp_path / "made", MADE)
    found = evaluate(real, made, "--extractor", NAME, "--metrics", "kid, fid")
    assert KEYS & found["metrics"].keys() == {"kid", "fid"} and found["protocol"]["left_out"] == []
    alone = evaluate(made, "--extractor", NAME, "--metrics", "isc")
    assert KEYS & alone["metrics"].keys() == {"isc"} and "reference" not in alone


def test_few_images_go_without_the_metrics_that_need_more(evaluate, call, tmp_path):
    made = write_folder(tmp_path / "few", MADE[:3])
    found = evaluate("digits32", made)
    assert found["protocol"]["left_out"] == ["isc", "prc"] and KEYS & found["metrics"].keys() == {"fid", "sfid", "kid"}
    assert "Left out, " in (shown := call("evaluate", "digits32", made).out) and shown.rstrip().endswith("isc, prc.")


# ---------------------------------------------------------------------- statistics


@pytest.mark.slow
def test_run_folder_against_a_name(evaluate, call, tmp_path, extractor, monkeypatch):
    run = write_run(tmp_path / "run", MADE, labels=classes(40, 70))
    monkeypatch.chdir(tmp_path)  # names do not depend on where one stands
    found = evaluate("digits32", run)
    statistics = reference.load_reference(reference.REPOSITORY / "models/digits32_reference.npz")
    wanted = measure(Subject(MADE, statistics, extractor, progress=False), ALL)
    assert_same(found, wanted)
    assert found["samples"]["run"] == {"script": "s", "method": "linear", "seed": 3}
    assert found["reference"]["name"].startswith("scikit-learn digits") and found["metrics"]["asked_share"] == 1
    # A run is also known by the folder and by the file in it.
    write_npz(run / "samples.npz", MADE)
    for inside in ("img", "samples.npz"):
        again = evaluate("digits32", run / inside)
        assert again["metrics"]["asked_share"] == 1 and again["samples"]["run"]["seed"] == 3
        assert_same(again, wanted, KEYS - {"isc"})
    other = evaluate("digits", run)
    assert abs(other["metrics"]["fid"] - wanted["fid"]) > 0.1
    shown = call("evaluate", "digits32", run).out
    assert f"| FID ↓ | {wanted['fid']:.2f} |" in shown and "| asked ↑ | 100.0 % |" in shown
    assert f"30 images of {run}, reference scikit-learn digits" in shown and "(1797 images)" in shown


def test_wrong_classes_lower_the_share_that_was_asked_for(evaluate, tmp_path):
    labels = [(c + 1) % 10 if i < 15 else c for i, c in enumerate(classes(40, 70))]
    assert evaluate("digits32", write_run(tmp_path / "run", MADE, labels=labels))["metrics"]["asked_share"] == 0.5


def test_statistics_file_of_ours(evaluate, tmp_path, extractor):
    save_reference(compute_reference(REAL, extractor, "forty digits", progress=False), tmp_path / "real.npz")
    found = evaluate(tmp_path / "real.npz", write_folder(tmp_path / "made", MADE))
    assert_same(found, expected(MADE, REAL, extractor))
    assert found["reference"]["name"] == "forty digits" and found["reference"]["extractor"] == NAME


@pytest.fixture
def adm_files(tmp_path, monkeypatch, extractor):
    """Statistics as ADM writes them, of a network that is quicker than Inception: with images, and without."""
    for owner in (reference, reference_set, module):
        monkeypatch.setattr(owner, "FOREIGN_EXTRACTOR", NAME)
    monkeypatch.setattr(reference, "FOREIGN_SIZES", {"": 64, "_s": 112})
    whole = find_reference("digits", extractor)
    arrays = {"mu": whole.gaussian.mu, "sigma": whole.gaussian.sigma}
    arrays |= {"mu_s": whole.spatial.mu, "sigma_s": whole.spatial.sigma}
    np.savez(tmp_path / "bare.npz", **arrays)
    return write_npz(tmp_path / "adm.npz", REAL, **arrays), tmp_path / "bare.npz", whole


def test_adms_statistics_with_images(evaluate, adm_files, tmp_path, extractor, extracted):
    adm, _, whole = adm_files
    made = write_npz(tmp_path / "made.npz", MADE)
    found = evaluate(adm, made)
    # FID and sFID by the statistics in the file, of the whole set; the rest by its images.
    whole_set = measure(Subject(MADE, whole, extractor, progress=False), ("fid", "sfid"))
    of_images = expected(MADE, REAL, extractor, adm_protocol=True)
    assert_same(found, whole_set, {"fid", "sfid"})
    assert_same(found, of_images, {"kid", "precision", "recall", "isc"})
    assert abs(whole_set["fid"] - of_images["fid"]) > 0.1
    assert found["reference"]["name"] == "adm.npz" and found["reference"]["weights_hash"] is None
    extracted.clear()
    evaluate(adm, made, "--metrics", "fid,sfid", "--no-cache")
    assert extracted == [30]  # its images are not needed
    assert evaluate(adm, made, "--metrics", "kid")["metrics"]["kid"] == pytest.approx(of_images["kid"], rel=SAME)


def test_adms_statistics_without_images(evaluate, call, adm_files, tmp_path):
    _, bare, _ = adm_files
    made = write_folder(tmp_path / "made", MADE)
    found = evaluate(bare, made)
    assert found["protocol"]["left_out"] == ["kid", "prc"] and {"fid", "sfid", "isc"} <= found["metrics"].keys()
    assert "which the reference statistics" in call("evaluate", bare, made, "--metrics", "fid,kid").error_line()


# ---------------------------------------------------------------------- the float run, and prompts


@pytest.mark.slow
def test_fidelity_to_the_float_run(evaluate, call, tmp_path):
    changed = np.clip(MADE.astype(int) + 3, 0, 255).astype(np.uint8)
    base, run = write_run(tmp_path / "float", MADE), write_run(tmp_path / "w4", changed)
    found = evaluate(run, "--against", base)
    error = ((changed.astype(float) - MADE) ** 2).mean(axis=(1, 2, 3))
    psnr = float((10 * np.log10(255**2 / error)).mean())
    assert found["metrics"]["psnr"] == pytest.approx(psnr, abs=1e-4)  # torchmetrics' logarithm in float32
    assert 0.5 < found["metrics"]["ssim"] < 1 and found["metrics"]["identical"] == 0
    assert found["metrics"].keys() == {"psnr", "ssim", "identical"} and "reference" not in found
    assert found["against"]["path"] == str(base) and found["against"]["run"]["seed"] == 3
    same = evaluate(base, "--against", base)["metrics"]
    assert same["identical"] == 30 and same["psnr"] == 100
    both = evaluate("digits32", run, "--against", base)
    assert both["metrics"].keys() >= KEYS | {"psnr"}
    assert f"{psnr:.1f} dB |" in (shown := call("evaluate", run, "--against", base).out) and str(base) in shown


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def test_clip_score(evaluate, tmp_path, clip):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    wanted = clip_scores(open_images(images), PROMPTS, clip, progress=False)
    found = evaluate(write_run(tmp_path / "run", images, prompts=PROMPTS), "--clip", "--clip-model", clip)
    assert found["metrics"].keys() == wanted.keys() and found["metrics"]["clip_model"] == str(clip)
    assert found["metrics"]["clip_score"] == pytest.approx(wanted["clip_score"], rel=1e-6)  # float32
    # A file, with what editors and txt2img.py's own files may have in them.
    (tmp_path / "prompts.txt").write_text("\ufeff" + "\n".join(f" {p} " for p in PROMPTS) + "\n\n", encoding="utf-8")
    folder = write_folder(tmp_path / "folder", images)
    words = ["--prompts", tmp_path / "prompts.txt", "--clip-model", clip]
    assert evaluate(folder, *words)["metrics"] == found["metrics"]
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[::-1]))
    assert abs(evaluate(folder, *words)["metrics"]["clip_score"] - wanted["clip_score"]) > 0.01


# ---------------------------------------------------------------------- what is written and kept


@pytest.mark.slow
def test_features_are_kept(evaluate, call, tmp_path, extracted):
    real, made = write_folder(tmp_path / "real", REAL), write_folder(tmp_path / "made", MADE)
    words = (real, made, "--extractor", NAME)
    first = evaluate(*words, "--metrics", "fid")
    assert sorted(extracted) == [30, 40] and len(list((tmp_path / "cache" / "features").iterdir())) == 2
    extracted.clear()
    assert evaluate(*words, "--metrics", "fid") == first and extracted == []
    evaluate(*words, "--metrics", "kid,isc")  # other metrics, same features
    assert extracted == []
    assert evaluate(*words, "--metrics", "fid", "--cache", tmp_path / "other")["metrics"] == first["metrics"]
    assert len(extracted) == 2 and len(list((tmp_path / "other").iterdir())) == 2
    extracted.clear()
    write_folder(made, MADE[:1][:, ::-1])  # an image changes: its set is done anew, the other is not
    assert evaluate(*words, "--metrics", "fid")["metrics"]["fid"] != first["metrics"]["fid"] and extracted == [30]


def test_no_cache_keeps_nothing(evaluate, tmp_path, extracted):
    made = write_folder(tmp_path / "made", MADE)
    for _ in range(2):
        evaluate("digits32", made, "--metrics", "fid", "--no-cache")
    assert extracted == [30, 30] and not (tmp_path / "cache").exists()


def test_json_beside_the_table(call, tmp_path):
    made, file = write_folder(tmp_path / "made", MADE), tmp_path / "new" / "result.json"
    outcome = call("evaluate", "digits32", made, "--json", file)
    assert outcome.code == 0 and outcome.out.startswith("30 images of ") and "| metric | value |" in outcome.out
    found = json.loads(file.read_text())
    assert f"| FID ↓ | {found['metrics']['fid']:.2f} |" in outcome.out
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert [p.name for p in file.parent.iterdir()] == ["result.json"]


@pytest.mark.slow
def test_class_folders_are_one_set_and_what_is_left_out_is_said(evaluate, call, tmp_path):
    """ImageNet's layout; and a folder of samples with pictures below it counts the samples alone."""
    for number, image in enumerate(MADE):
        write_folder(tmp_path / "classes" / f"n{number % 3}" / f"{number:03d}", image[None])
    found = evaluate("digits32", tmp_path / "classes", "--metrics", "isc")
    assert found["samples"]["images"] == len(MADE)
    flat = write_folder(tmp_path / "flat", MADE)
    alone = evaluate("digits32", flat)
    write_folder(flat / "grids", REAL)
    outcome = call("evaluate", "digits32", flat, "--json", "-")
    assert json.loads(outcome.out)["metrics"] == alone["metrics"]
    assert "using the 30 images directly in it, not the 40 in folders below" in outcome.err
