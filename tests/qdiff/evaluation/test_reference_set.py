"""Whether a reference that a user names is images, statistics, or both."""

from __future__ import annotations

import numpy as np
import pytest

from ddim.datasets.digits import load_digit_images
from qdiff.errors import UserError
from qdiff.evaluation.reference import FOREIGN_EXTRACTOR, compute_reference, find_reference, save_reference
from qdiff.evaluation.reference_set import ReferenceSet
from qdiff.io.images import save_png

DIGITS = "digits-classifier"


@pytest.fixture(scope="module")
def images():
    return load_digit_images(16)[0][:12, ..., None]


@pytest.fixture(scope="module")
def folder(images, tmp_path_factory, extractor):
    made = tmp_path_factory.mktemp("references")
    for i, image in enumerate(images):
        save_png(image, made / "real" / f"{i:02d}.png")
        save_png(image, made / "run" / "img" / f"{i:02d}.png")
    np.savez(made / "images.npz", images)
    reference = compute_reference(images, extractor, "twelve", progress=False)
    save_reference(reference, made / "ours.npz")
    gaussian = {"mu": reference.gaussian.mu, "sigma": reference.gaussian.sigma}
    np.savez(made / "both.npz", images, **gaussian)
    return made


@pytest.mark.parametrize(
    ("name", "count", "has_statistics"),
    [("real", 12, False), ("run", 12, False), ("images.npz", 12, False), ("ours.npz", 0, True), ("both.npz", 12, True)],
)
def test_what_a_path_holds(name, count, has_statistics, folder):
    found = ReferenceSet(folder / name)
    assert found.has_statistics == has_statistics
    assert (0 if found.images is None else len(found.images)) == count


def test_a_name_is_a_folder_only_where_there_is_one(tmp_path, monkeypatch, images, extractor):
    monkeypatch.chdir(tmp_path)
    named = ReferenceSet("digits")
    assert named.images is None and named.extractor == DIGITS and named.statistics(extractor).count == 1797
    for i, image in enumerate(images):
        save_png(image, tmp_path / "digits" / f"{i:02d}.png")
    beside = ReferenceSet("digits")
    assert len(beside.images) == 12 and beside.statistics(extractor) is None and beside.extractor == FOREIGN_EXTRACTOR


def test_files_are_found_from_the_repository_too(tmp_path, monkeypatch, extractor):
    monkeypatch.chdir(tmp_path)
    found = ReferenceSet("models/digits32_reference.npz")
    assert found.extractor == DIGITS
    assert found.statistics(extractor).images_hash == find_reference("digits32", extractor).images_hash
    with pytest.raises(UserError, match=r"There is no file none\.npz"):
        ReferenceSet("none.npz")


def test_statistics_are_completed_by_images(folder, images, extractor, monkeypatch):
    whole = compute_reference(images, extractor, "twelve", progress=False)
    alone = ReferenceSet(folder / "images.npz").completed(None, extractor, needs_features=False)
    assert np.array_equal(alone.features, whole.features) and np.array_equal(alone.gaussian.mu, whole.gaussian.mu)
    monkeypatch.setattr("qdiff.evaluation.reference.FOREIGN_SIZES", {"": 64})
    monkeypatch.setattr("qdiff.evaluation.reference.FOREIGN_EXTRACTOR", DIGITS)
    both = ReferenceSet(folder / "both.npz")
    bare = both.statistics(extractor)
    assert bare.features is None and both.completed(bare, extractor, needs_features=False) is bare
    completed = both.completed(bare, extractor, needs_features=True)
    assert np.array_equal(completed.features, whole.features) and completed.gaussian is bare.gaussian
