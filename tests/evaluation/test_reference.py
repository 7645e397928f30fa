"""Reference statistics: what is saved comes back, what was made with something else is refused."""

import json

import numpy as np
import pytest
import torch

from ddim.datasets.digits import load_digit_images
from qdiff.errors import UserError
from qdiff.evaluation.extractors import EXTRACTORS, REPOSITORY, create_extractor
from qdiff.evaluation.metrics import compute_reference
from qdiff.evaluation.reference import (
    ReferenceStatistics,
    bundled_reference,
    load_reference,
    save_reference,
)

DIGITS = "digits-classifier"
STATISTICS_TOLERANCE = 1e-12  # float64 sums in another order
FEATURE_TOLERANCE = 1e-3  # the bundled features on another CPU; they have variance 1


@pytest.fixture
def reference():
    features = np.random.default_rng(0).normal(2.0, 1.0, (50, 6)).astype(np.float32)
    return ReferenceStatistics("some images", features, DIGITS, "a" * 64, "b" * 64)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_save_and_load_give_back_everything(reference, tmp_path, dtype):
    kept = ReferenceStatistics("Ziffern, 16×16", reference.features.astype(dtype), DIGITS, "a" * 64, "b" * 64)
    save_reference(kept, tmp_path / "new" / "r.npz")
    loaded = load_reference(tmp_path / "new" / "r.npz")
    assert loaded.features.dtype == dtype and np.array_equal(loaded.features, kept.features)
    for field in ("name", "extractor", "weights_hash", "images_hash", "count"):
        assert getattr(loaded, field) == getattr(kept, field)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.npz"]


def test_equal_content_gives_equal_bytes(reference, tmp_path):
    save_reference(reference, tmp_path / "1.npz")
    save_reference(reference, tmp_path / "2.npz")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


def test_mean_and_covariance_are_float64_and_right(reference):
    rows = reference.features.astype(np.float64).tolist()
    mu = np.array([sum(column) / 50 for column in zip(*rows, strict=True)])
    deviations = np.array(rows) - mu
    sigma = sum(np.outer(row, row) for row in deviations) / 49
    assert reference.mu.dtype == reference.sigma.dtype == np.float64
    assert np.abs(reference.mu - mu).max() < STATISTICS_TOLERANCE
    assert np.abs(reference.sigma - sigma).max() < STATISTICS_TOLERANCE
    # The planted errors: a float32 mean, and the divisor N.
    assert np.abs(reference.features.mean(axis=0) - mu).max() > STATISTICS_TOLERANCE
    assert np.abs(reference.sigma * 49 / 50 - sigma).max() > STATISTICS_TOLERANCE


def test_bundled_reference_is_of_all_digits_with_the_bundled_weights(extractor):
    path = REPOSITORY / EXTRACTORS[DIGITS].reference
    bundled = bundled_reference(DIGITS, extractor)
    images, _ = load_digit_images(16)
    made = compute_reference(images[..., None], extractor, "now", progress=False)
    assert path.stat().st_size <= 500_000
    assert bundled.count == 1797 and bundled.features.shape == (1797, 64)
    assert bundled.images_hash == made.images_hash and bundled.weights_hash == made.weights_hash
    assert np.abs(bundled.features - made.features).max() < FEATURE_TOLERANCE
    # The planted error: one grey level in one pixel of one image.
    images[5, 8, 8] ^= 1
    changed = compute_reference(images[..., None], extractor, "changed", progress=False)
    assert changed.images_hash != bundled.images_hash
    assert np.abs(changed.features - bundled.features).max() > FEATURE_TOLERANCE


def test_features_normalised_over_the_training_digits_have_mean_0_and_variance_1(extractor):
    bundled = bundled_reference(DIGITS)
    assert np.abs(bundled.mu).max() < 0.2 and np.trace(bundled.sigma) == pytest.approx(64, rel=0.1)


def test_another_extractor_or_other_weights_are_refused(extractor, tmp_path):
    images, _ = load_digit_images(16)
    made = compute_reference(images[:20, None], extractor, "twenty digits", progress=False)
    save_reference(made, tmp_path / "r.npz")
    assert load_reference(tmp_path / "r.npz", extractor).count == 20

    other = create_extractor(DIGITS)
    with torch.no_grad():
        other.classifier.head.weight[0, 0] += 1e-3
    with pytest.raises(UserError, match="'twenty digits' were made with other weights of digits-classifier"):
        load_reference(tmp_path / "r.npz", other)

    foreign = ReferenceStatistics("x", made.features, "inception-v3-compat", made.weights_hash, "b" * 64)
    with pytest.raises(UserError, match="made with the extractor inception-v3-compat, not digits-classifier"):
        foreign.require_extractor(extractor)


def test_missing_file_and_missing_bundle(tmp_path):
    with pytest.raises(UserError, match=r"no reference statistics at .*none\.npz"):
        load_reference(tmp_path / "none.npz")
    with pytest.raises(UserError, match="No reference statistics come with the extractor inception-v3-compat"):
        bundled_reference("inception-v3-compat")


def _about(**changes):
    about = {"format": "qdiff reference statistics 1", "name": "n", "count": 3, "extractor": DIGITS}
    return np.array(json.dumps(about | {"weights_hash": "a", "images_hash": "b"} | changes))


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3), "sigma": np.zeros((3, 3))},  # guided-diffusion's and pytorch-fid's layout
        {"features": np.zeros((3, 2), np.float32), "about": _about(format="something else")},
        {"features": np.zeros((3, 2), np.float64), "about": _about()},
        {"features": np.zeros((4, 2), np.float32), "about": _about()},
        {"features": np.array([{}], dtype=object), "about": _about()},  # would have to be unpickled
        {"features": np.zeros((3, 2), np.float32), "about": np.array("[1, 2]")},
    ],
)
def test_archives_of_another_kind_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match=r"r\.npz does not hold reference statistics"):
        load_reference(tmp_path / "r.npz")


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated", "single array"])
def test_damaged_files_are_refused(reference, tmp_path, damage):
    path = tmp_path / "r.npz"
    save_reference(reference, path)
    if damage == "single array":
        with path.open("wb") as file:
            np.save(file, reference.features)
    else:
        path.write_bytes({"garbage": b"?" * 99, "empty": b"", "truncated": path.read_bytes()[:700]}[damage])
    with pytest.raises(UserError, match="does not hold reference statistics"):
        load_reference(path)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(reference, tmp_path, monkeypatch):
    def interrupted(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "r.npz"
    path.write_bytes(b"old")
    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_reference(reference, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_features_must_be_a_small_float_matrix():
    with pytest.raises(ValueError, match="float32 or float16"):
        ReferenceStatistics("n", np.zeros((3, 2)), DIGITS, "a", "b")
