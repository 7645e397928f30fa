"""scripts/prepare_reference.py: statistics of a data set that the user has, by the bundled digits classifier."""

from __future__ import annotations

import dataclasses
import hashlib
import urllib.request

import numpy as np
import pytest
from PIL import Image
from script_device import ON_DEVICE
from threadpoolctl import threadpool_limits

from qdiff.evaluation.datasets import DATASETS
from qdiff.evaluation.extractors import create_extractor
from qdiff.evaluation.reference import compute_reference, find_reference, load_reference

SCRIPT = "prepare_reference"
DIGITS = ("--extractor", "digits-classifier", *ON_DEVICE)
COUNT = 8


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread():
    """SciPy's BLAS does not heed OMP_NUM_THREADS set after its import."""
    with threadpool_limits(1):
        yield


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def small_cifar(monkeypatch):
    """CIFAR-10 has COUNT images in these tests."""
    monkeypatch.setitem(DATASETS, "cifar10", dataclasses.replace(DATASETS["cifar10"], count=COUNT))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("fetched without being asked"))


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(pixels, tmp_path):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def files(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_statistics_of_a_folder_go_where_they_are_found_by_name(folder, pixels, call, cache, offline):
    outcome = call(SCRIPT, "cifar10", "--images", folder, *DIGITS)
    assert outcome.code == 0, outcome.err
    extractor = create_extractor("digits-classifier")
    found = find_reference("cifar10", extractor)
    expected = compute_reference(pixels, extractor, "", progress=False)
    assert found.count == COUNT and found.name == f"CIFAR-10 train, {COUNT} images, 32×32 as published"
    assert found.name in outcome.out and "evaluate.py finds it by the name cifar10" in outcome.out
    assert found.images_hash == expected.images_hash and np.array_equal(found.features, expected.features)
    assert "warning" not in outcome.err
    assert len(files(cache)) == 1 and files(cache)[0].startswith("cifar10-digits-classifier-")


def test_prepared_statistics_are_not_made_twice(folder, call, cache, offline):
    assert call(SCRIPT, "cifar10", "--images", folder, *DIGITS).code == 0
    (path,) = (cache / "references").iterdir()
    before = path.stat()
    again = call(SCRIPT, "cifar10", "--images", folder, *DIGITS)
    assert again.code == 0 and f"{path} already exists" in again.out
    assert path.stat() == before


def test_npz_and_folder_give_the_same_file(folder, pixels, call, tmp_path, offline):
    np.savez(tmp_path / "images.npz", pixels)
    for option, source, out in (("--images", folder, "a.npz"), ("--npz", tmp_path / "images.npz", "b.npz")):
        outcome = call(SCRIPT, "cifar10", option, source, *DIGITS, "--batch_size", 3, "--out", tmp_path / out)
        assert outcome.code == 0 and "evaluate.py finds" not in outcome.out
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("count", [COUNT - 2, COUNT + 1])
def test_another_number_of_images_warns_and_never_passes_for_the_published_one(count, folder, call, cache):
    for extra in range(COUNT, count):
        Image.new("RGB", (32, 32)).save(folder / f"{extra}.png")
    for missing in range(count, COUNT):
        (folder / f"{missing}.png").unlink()
    outcome = call(SCRIPT, "cifar10", "--images", folder, *DIGITS)
    assert outcome.code == 0
    assert f"warning: {folder} holds CIFAR-10 train, {count} images instead of {COUNT}" in outcome.err
    assert f"finds it by the name cifar10-{count}" in outcome.out
    (name,) = files(cache)
    assert name.startswith(f"cifar10-{count}-digits")
    assert load_reference(cache / "references" / name).count == count


def test_max_images_takes_the_first_and_says_so(folder, pixels, call, cache):
    outcome = call(SCRIPT, "cifar10", "--images", folder, *DIGITS, "--max_images", 3)
    assert outcome.code == 0 and "warning" not in outcome.err
    (name,) = files(cache)
    assert name.startswith("cifar10-first3-digits")
    made = load_reference(cache / "references" / name)
    extractor = create_extractor("digits-classifier")
    assert made.images_hash == compute_reference(pixels[:3], extractor, "", progress=False).images_hash
    assert "first 3" in made.name


def test_download_only_when_asked(pixels, call, tmp_path, cache, monkeypatch):
    source = tmp_path / "served.tar.gz"
    source.write_bytes(b"not CIFAR-10")
    entry = dataclasses.replace(DATASETS["cifar10"], url=source.as_uri())
    monkeypatch.setitem(DATASETS, "cifar10", entry)
    with monkeypatch.context() as patch:
        patch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("fetched without being asked"))
        line = call(SCRIPT, "cifar10", *DIGITS).error_line()
    assert entry.url in line and "--download" in line and "--images" in line
    outcome = call(SCRIPT, "cifar10", *DIGITS, "--download")
    assert outcome.code == 2 and outcome.out == "" and "wrong MD5" in outcome.err.splitlines()[-1]
    assert not cache.exists() or files(cache) == []


def test_download_then_statistics(pixels, call, tmp_path, cache, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    import io
    import shutil

    environment = lmdb.open(str(tmp_path / "church_outdoor_train_lmdb"), map_size=1 << 22)
    with environment.begin(write=True) as transaction:
        for i, image in enumerate(pixels):
            file = io.BytesIO()
            Image.fromarray(image[:, : 20 + i]).save(file, format="WEBP")
            transaction.put(b"%d" % i, file.getvalue())
    environment.close()
    archive = shutil.make_archive(str(tmp_path / "served"), "zip", tmp_path, "church_outdoor_train_lmdb")
    content = (tmp_path / "served.zip").read_bytes()
    entry = dataclasses.replace(
        DATASETS["lsun_church"],
        url=(tmp_path / archive).as_uri(),
        sha256=hashlib.sha256(content).hexdigest(),
        count=COUNT,
    )
    monkeypatch.setitem(DATASETS, "lsun_church", entry)
    outcome = call(SCRIPT, "lsun_church", *DIGITS, "--download")
    assert outcome.code == 0, outcome.err
    found = find_reference("lsun_church", create_extractor("digits-classifier"))
    assert found.count == COUNT and "LDM's loader" in found.name
    assert files(cache / "datasets") == ["data.mdb", "lock.mdb"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mnist"], "no data set 'mnist'"),
        ([], "NAME"),
        (["cifar10", "--lmdb", "x"], "cannot be read from --lmdb"),
        (["imagenet256", "--images", "x"], "give it with --npz"),
        (["cifar10", "--images", "x", "--npz", "y"], "not allowed with"),
        (["cifar10", "--images", "x", "--download"], "not allowed with"),
        (["cifar10", "--images", "none"], "no folder"),
        (["cifar10", "--npz", "none.npz"], "no file"),
        (["lsun_church", "--lmdb", "none"], "no LMDB"),
        (["cifar10", "--images", "FOLDER", "--batch_size", 0], "--batch_size is 0; give at least 1"),
        (["cifar10", "--images", "FOLDER", "--max_images", 1], "--max_images is 1; give at least 2"),
        (["imagenet256", "--npz", "x", "--max_images", 5], "imagenet256 has published statistics of all its images"),
        (["cifar10", "--images", "FOLDER", "--out", "stats.txt"], "ends in .npz"),
        (["cifar10", "--images", "FOLDER", "--out", "/proc/stats.npz"], "cannot be written"),
        (["cifar10", "--images", "FOLDER", "--extractor", "vgg"], "no feature extractor 'vgg'"),
        (["cifar10", "--images", "FOLDER", "--extractor-weights", "none"], "none"),
        (["cifar10", "--images", "FOLDER", "--device", "tpu"], "--device tpu"),
        (["lsun_church", "--images", "WRONG"], "not a readable image"),
        (["cifar10", "--images", "SMALL"], "those of cifar10 are 32×32"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(words, says, folder, call, cache, offline, tmp_path):
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "a.png").write_text("no image")
    (tmp_path / "small").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "small" / "a.png")
    places = {"FOLDER": folder, "WRONG": tmp_path / "wrong", "SMALL": tmp_path / "small"}
    words = [places.get(w, w) for w in words]
    options = [] if "--extractor" in words else DIGITS
    options = [o for o in options if "--device" not in words or o not in ON_DEVICE]
    assert says in call(SCRIPT, *words, *options).error_line()
    assert not cache.exists()


def test_unreadable_image_halfway_leaves_no_statistics(folder, call, cache):
    (folder / "5.png").write_text("no image")
    outcome = call(SCRIPT, "cifar10", "--images", folder, *DIGITS)
    assert outcome.code == 2 and str(folder / "5.png") in outcome.err.splitlines()[-1]
    assert files(cache) == []
