"""Reference statistics: what is saved comes back, what was made with something else is refused."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddim.datasets.digits import load_digit_images
from qdiff.errors import UserError
from qdiff.evaluation import reference as module
from qdiff.evaluation.extractors import create_extractor
from qdiff.evaluation.gaussians import Gaussian, frechet_distance
from qdiff.evaluation.reference import (
    BUNDLED,
    ReferenceStatistics,
    cached_reference_path,
    compute_reference,
    find_reference,
    holds_statistics,
    load_reference,
    save_reference,
)
from qdiff.io.repository import REPOSITORY

DIGITS = "digits-classifier"
SELF_FID = 1e-3  # statistics made on another CPU; half of the digits are at 0.1
FEATURE_TOLERANCE = 1e-3  # the bundled features on another CPU; they have variance 1
COVARIANCE_TOLERANCE = 1e-4  # and the means and covariances of those, in which rounding averages out


@pytest.fixture
def reference():
    random = np.random.default_rng(0)
    features = random.normal(2.0, 1.0, (50, 6)).astype(np.float32)
    spatial = Gaussian.of(random.normal(size=(50, 14)))
    return ReferenceStatistics("Ziffern, 16×16", DIGITS, "a" * 64, "b" * 64, Gaussian.of(features), spatial, features)


def same(a: Gaussian | None, b: Gaussian | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.count == b.count and np.array_equal(a.mu, b.mu) and np.array_equal(a.sigma, b.sigma)


@pytest.mark.parametrize("without", [(), ("features",), ("spatial",), ("features", "spatial")])
def test_save_and_load_give_back_everything(reference, tmp_path, without):
    kept = replace(reference, **dict.fromkeys(without))
    save_reference(kept, tmp_path / "new" / "r.npz")
    loaded = load_reference(tmp_path / "new" / "r.npz")
    for field in ("name", "extractor", "weights_hash", "images_hash", "count"):
        assert getattr(loaded, field) == getattr(kept, field)
    assert same(loaded.gaussian, kept.gaussian) and same(loaded.spatial, kept.spatial)
    if "features" in without:
        assert loaded.features is None
    else:
        assert loaded.features.dtype == np.float32 and np.array_equal(loaded.features, kept.features)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.npz"]


def test_files_hold_the_arrays_that_adms_evaluator_reads(reference, tmp_path):
    save_reference(reference, tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz") as archive:
        assert set(archive) == {"about", "mu", "sigma", "mu_s", "sigma_s", "features"}
        for name, gaussian in (("", reference.gaussian), ("_s", reference.spatial)):
            assert np.array_equal(archive[f"mu{name}"], gaussian.mu)
            assert np.array_equal(archive[f"sigma{name}"], gaussian.sigma)


def test_equal_content_gives_equal_bytes(reference, tmp_path):
    save_reference(reference, tmp_path / "1.npz")
    save_reference(reference, tmp_path / "2.npz")
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()


@pytest.mark.slow
def test_bundled_reference_is_of_all_digits_with_the_bundled_weights(extractor):
    path = REPOSITORY / BUNDLED["digits"]
    bundled = find_reference("digits", extractor)
    images, _ = load_digit_images(16)
    made = compute_reference(images[..., None], extractor, "now", progress=False)
    assert path.stat().st_size <= 550_000
    assert bundled.count == 1797 and bundled.features.shape == (1797, 64)
    assert bundled.images_hash == made.images_hash and bundled.weights_hash == made.weights_hash
    assert np.abs(bundled.features - made.features).max() < FEATURE_TOLERANCE
    for ours, theirs in ((bundled.gaussian, made.gaussian), (bundled.spatial, made.spatial)):
        assert ours.count == 1797
        assert np.abs(ours.mu - theirs.mu).max() < COVARIANCE_TOLERANCE
        assert np.abs(ours.sigma - theirs.sigma).max() < COVARIANCE_TOLERANCE
    # The planted error: one grey level in one pixel of one image.
    images[5, 8, 8] ^= 1
    changed = compute_reference(images[..., None], extractor, "changed", progress=False)
    assert changed.images_hash != bundled.images_hash
    assert np.abs(changed.features - bundled.features).max() > FEATURE_TOLERANCE
    # And ten digits left out, which changes mean and covariance.
    fewer = compute_reference(images[10:, ..., None], extractor, "fewer", progress=False)
    assert np.abs(fewer.gaussian.sigma - bundled.gaussian.sigma).max() > COVARIANCE_TOLERANCE
    assert np.abs(fewer.spatial.sigma - bundled.spatial.sigma).max() > COVARIANCE_TOLERANCE


def test_features_of_many_images_are_thinned_and_their_gaussian_is_not(extractor, tmp_path, monkeypatch):
    images = load_digit_images(16)[0][:90, ..., None]
    full = compute_reference(images, extractor, "all", progress=False)
    monkeypatch.setattr(module, "MOST_FEATURES", 30)
    thinned = compute_reference(images, extractor, "thinned", progress=False)
    save_reference(thinned, tmp_path / "r.npz")
    thinned = load_reference(tmp_path / "r.npz")
    assert thinned.count == 90 and thinned.features.shape == (30, 64)
    assert same(thinned.gaussian, full.gaussian) and same(thinned.spatial, full.spatial)
    chosen = [round(i * 89 / 29) for i in range(30)]
    assert np.array_equal(thinned.features, full.features[chosen])
    # The planted error: the Gaussian of the features that were kept.
    assert frechet_distance(Gaussian.of(thinned.features), full.gaussian) > 0.1


def test_features_normalised_over_the_training_digits_have_mean_0_and_variance_1(extractor):
    bundled = find_reference("digits", extractor)
    assert np.abs(bundled.gaussian.mu).max() < 0.2 and np.trace(bundled.gaussian.sigma) == pytest.approx(64, rel=0.1)


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

    foreign = replace(made, extractor="inception-v3-compat")
    with pytest.raises(UserError, match="made with the extractor inception-v3-compat, not digits-classifier"):
        foreign.require_extractor(extractor)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no reference statistics at .*none\.npz"):
        load_reference(tmp_path / "none.npz")


def _about(**changes):
    about = {"format": "qdiff reference statistics 2", "name": "n", "count": 3, "extractor": DIGITS}
    return np.array(json.dumps(about | {"weights_hash": "a", "images_hash": "b"} | changes))


STATISTICS = {"mu": np.zeros(3), "sigma": np.eye(3)}
INCEPTION_STATISTICS = {"mu": np.zeros(2048), "sigma": np.zeros((2048, 2048))}


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "mu"),  # images alone
        (STATISTICS, r"mu is \[3\].* \[2048\]"),  # pytorch-fid, of another layer than Inception's last
        ({**INCEPTION_STATISTICS, "mu_s": np.zeros(3), "sigma_s": np.eye(3)}, r"mu_s is \[3\].* \[2023\]"),
        ({**STATISTICS, "about": _about(format="qdiff reference statistics 1")}, "statistics 1"),
        ({"about": _about(), "mu": np.zeros(3)}, "sigma"),
        ({"about": _about(), "mu": np.zeros(3), "sigma": np.eye(2)}, "mean and covariance"),
        ({"about": _about(), "mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"about": _about(), **STATISTICS, "mu_s": np.zeros(2)}, "sigma_s"),
        ({"about": _about(), **STATISTICS, "features": np.zeros((3, 2), np.float32)}, r"features are \[3, 2\]"),
        ({"about": _about(), **STATISTICS, "features": np.zeros(3, np.float32)}, r"features are \[3\]"),
        ({"about": _about(), **STATISTICS, "features": np.array([{}], dtype=object)}, "pickle"),
        ({"about": np.array("[1, 2]"), **STATISTICS}, ""),
        ({"about": np.array("no json"), **STATISTICS}, ""),
    ],
)
def test_archives_of_another_kind_are_refused(tmp_path, arrays, says):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match=rf"r\.npz does not hold reference statistics \(.*{says}"):
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


@pytest.mark.slow
def test_no_flipped_bit_ends_in_a_traceback(reference, tmp_path):
    """NumPy, zipfile, zlib and json each raise their own errors for damaged files."""
    path = tmp_path / "r.npz"
    save_reference(reference, path)
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x81]) + content[place + 1 :])
        try:
            load_reference(path)
        except UserError:
            refused += 1
    assert refused > len(content) / 7 / 2  # the rest are dates and the like


def test_images_and_statistics_are_told_apart(reference, tmp_path):
    save_reference(reference, tmp_path / "ours.npz")
    images = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}
    np.savez(tmp_path / "adm.npz", **images, **STATISTICS)
    np.savez(tmp_path / "samples.npz", **images)
    (tmp_path / "garbage.npz").write_bytes(b"?")
    held = {name: holds_statistics(tmp_path / f"{name}.npz") for name in ("ours", "adm", "samples", "garbage", "none")}
    assert held == {"ours": True, "adm": True, "samples": False, "garbage": False, "none": False}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_statistics_are_found_by_name_and_by_path_from_anywhere(name, extractor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_reference(name, extractor)
    assert found.count == 1797 and found.spatial.count == 1797
    for path in (BUNDLED[name], REPOSITORY / BUNDLED[name]):
        assert find_reference(path, extractor).images_hash == found.images_hash


def test_the_two_bundled_statistics_differ(extractor):
    small, large = (find_reference(name, extractor) for name in ("digits", "digits32"))
    assert frechet_distance(small.gaussian, large.gaussian) > 100 * SELF_FID
    assert abs(frechet_distance(small.gaussian, find_reference("digits", extractor).gaussian)) < SELF_FID


def test_prepared_statistics_are_found_by_name_for_the_weights_that_made_them(
    reference, extractor, tmp_path, monkeypatch
):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    images = load_digit_images(16)[0][:20, ..., None]
    path = cached_reference_path("twenty", extractor)
    assert path.is_relative_to(tmp_path / "cache")
    with pytest.raises(UserError) as caught:
        find_reference("twenty", extractor)
    for word in ("'twenty'", str(path), "prepare_reference.py twenty", "digits32"):
        assert word in str(caught.value)
    save_reference(compute_reference(images, extractor, "twenty digits", progress=False), path)
    assert find_reference("twenty", extractor).name == "twenty digits"
    other = create_extractor(DIGITS)
    with torch.no_grad():
        other.classifier.head.weight[0, 0] += 1e-3
    with pytest.raises(UserError, match="no reference statistics 'twenty'"):
        find_reference("twenty", other)


def test_a_missing_file_is_told_as_a_file(extractor, tmp_path):
    with pytest.raises(UserError, match=r"no reference statistics at .*none\.npz"):
        find_reference(tmp_path / "none.npz", extractor)
    assert os.listdir(tmp_path) == []
