"""scripts/train_extractor.py --reference-only: statistics of another size by the classifier that is there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ddim.datasets.digits import load_digit_images
from qdiff.evaluation.extractors import create_extractor
from qdiff.evaluation.measure import measure
from qdiff.evaluation.reference import compute_reference, load_reference
from qdiff.evaluation.subject import Subject

MODELS = Path(__file__).parents[2] / "models"
WEIGHTS = "digits_classifier.safetensors"
FEATURE_TOLERANCE = 1e-3  # the bundled features on another CPU; they have variance 1
SELF_FID = 1e-4  # of the digits with their own statistics; float32 features of another CPU


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread():
    """SciPy's BLAS does not heed OMP_NUM_THREADS set after its import."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def folder(tmp_path):
    """A folder with a copy of the bundled classifier."""
    shutil.copy(MODELS / WEIGHTS, tmp_path / WEIGHTS)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "file", "size"),
    [
        ([], "digits_reference.npz", 16),
        (["--size", 16], "digits_reference.npz", 16),
        (["--size", 32], "digits32_reference.npz", 32),
    ],
)
def test_only_the_reference_is_written_and_is_the_bundled_one(words, file, size, call, folder):
    outcome = call("train_extractor", "--reference-only", *words, "--out", folder)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"wrote {folder / file} (")
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, file}
    assert (folder / WEIGHTS).read_bytes() == (MODELS / WEIGHTS).read_bytes()
    made, bundled = load_reference(folder / file), load_reference(MODELS / file)
    assert made.name == bundled.name == f"scikit-learn digits, all 1797, bicubic to {size}×{size}"
    assert (made.images_hash, made.weights_hash) == (bundled.images_hash, bundled.weights_hash)
    assert np.abs(made.features - bundled.features).max() < FEATURE_TOLERANCE
    for ours, theirs in ((made.gaussian, bundled.gaussian), (made.spatial, bundled.spatial)):
        assert ours.count == theirs.count == 1797
        assert np.abs(ours.sigma - theirs.sigma).max() < FEATURE_TOLERANCE


@pytest.mark.slow
def test_reference_of_32_is_of_rgb_digits_of_32_and_not_of_16():
    extractor = create_extractor("digits-classifier")
    images, _ = load_digit_images(32)
    rgb = np.repeat(images[..., None], 3, axis=3)
    bundled = load_reference(MODELS / "digits32_reference.npz", extractor)
    made = compute_reference(rgb, extractor, "RGB", progress=False)
    # Three equal channels are the one channel that the file was made from.
    assert made.images_hash == bundled.images_hash
    assert np.abs(made.features - bundled.features).max() < FEATURE_TOLERANCE
    # A reference of the wrong size has a distance of its own.
    other = load_reference(MODELS / "digits_reference.npz", extractor)
    both = ("fid", "sfid")
    near, far = (measure(Subject(rgb, real, extractor, progress=False), both) for real in (bundled, other))
    for metric in both:
        assert near[metric] == pytest.approx(0, abs=SELF_FID) and far[metric] > 100 * SELF_FID, (near, far)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--size", 32], "--size needs --reference-only"),
        (["--reference-only", "--size", 7], "--size is 7; give at least 8"),
        (["--reference-only", "--size", "big"], "--size"),
        (["--reference-only"], "no file"),  # there is no classifier in the folder
    ],
)
def test_bad_options_write_nothing(words, says, call, tmp_path):
    assert says in call("train_extractor", *words, "--out", tmp_path).error_line()
    assert list(tmp_path.iterdir()) == []
