"""Published data sets: read from each form they come in, fetched only when asked, checked."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import pickle
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import ldm_square, random_pixels, write_images
from PIL import Image
from torchvision.datasets import CIFAR10

from qdiff.errors import UserError
from qdiff.evaluation import dataset_images, reference
from qdiff.evaluation.dataset_images import dataset_reference, fetch_dataset, locate, open_dataset
from qdiff.evaluation.datasets import DATASETS, CropResize, find_dataset
from qdiff.evaluation.image_sets import ArrayImages, FirstImages, FolderImages, NpzImages
from qdiff.evaluation.lmdb_images import LmdbImages


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    """Any attempt to fetch fails the test."""
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("fetched without being asked"))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def all_of(images) -> np.ndarray:
    return torch.cat(list(images.batches(3))).permute(0, 2, 3, 1).numpy()


# --- The registry


def test_every_entry_is_whole():
    for name, dataset in DATASETS.items():
        assert dataset.count > 0 and dataset.options and dataset.url.startswith(("https://", "http://")), name
        assert dataset.prepare is None or dataset.prepare == CropResize(dataset.sides)
        assert dataset.url.startswith("https://") or len(dataset.sha256) == 64  # http alone needs a strong sum
        assert (dataset.unpacks_to is not None) == dataset.url.endswith(".zip")
        for sum_, length in ((dataset.md5, 32), (dataset.sha256, 64)):
            assert sum_ is None or (len(sum_) == length and int(sum_, 16))
    assert DATASETS["cifar10"].md5 == CIFAR10.tgz_md5 and DATASETS["cifar10"].url == CIFAR10.url


def test_names_of_statistics_tell_split_size_filter_and_unusual_counts():
    church = find_dataset("lsun_church")
    text = "LSUN church_outdoor train, {}, centre crop as LDM's loader, Pillow bicubic to 256×256"
    assert church.describe(126_227) == text.format("126,227 images")
    assert church.describe(121_227) == text.format("121,227 images (without LDM's 5,000 for validation)")
    assert church.describe(126_226) == text.format("126,226 images instead of 126,227")
    assert church.describe(100, first=True) == text.format("first 100")
    assert find_dataset("cifar10").describe(50_000) == "CIFAR-10 train, 50,000 images, 32×32 as published"


def test_unknown_name_lists_the_known():
    with pytest.raises(UserError, match=r"'cifar'; .* cifar10, lsun_bedroom"):
        find_dataset("cifar")


# --- Finding


def test_nothing_is_fetched_without_being_asked(offline, cache):
    for name, dataset in DATASETS.items():
        with pytest.raises(UserError) as caught:
            locate(name)
        message = str(caught.value)
        assert dataset.url in message and "--download" in message and f"--{dataset.options[0]}" in message
        assert str(dataset.cached) in message and "\n" not in message
    assert not cache.exists()


def test_option_names_the_source(offline, tmp_path):
    assert locate("cifar10", "images", tmp_path) == ("images", tmp_path)
    with pytest.raises(UserError, match="cifar10 cannot be read from --lmdb; give it with --images or --npz"):
        locate("cifar10", "lmdb", tmp_path)


@pytest.mark.parametrize("fetch", [False, True])
def test_what_the_cache_has_is_used(fetch, offline, cache):
    (cache / "datasets" / "val2014").mkdir(parents=True)
    assert locate("coco2014val", fetch=fetch) == ("images", cache / "datasets" / "val2014")


# --- Fetching


def zipped(folder: str, names=("a.jpg", "b.jpg")) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(f"{folder}/{name}", name)
    return file.getvalue()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """``served(name, content, **changes)``: a data set's file now comes from a file URL; returns the entry."""

    def serve(name: str, content: bytes, **changes):
        dataset = DATASETS[name]
        source = tmp_path / "served" / dataset.url.rsplit("/", 1)[1]
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(content)
        sums = {"md5": hashlib.md5, "sha256": hashlib.sha256}
        measured = {k: f(content).hexdigest() for k, f in sums.items() if getattr(dataset, k) is not None}
        entry = dataclasses.replace(dataset, **{"url": source.as_uri(), **measured, **changes})
        monkeypatch.setitem(DATASETS, name, entry)
        return entry

    return serve


def test_archives_are_fetched_unpacked_and_removed(served, cache, monkeypatch):
    served("coco2014val", zipped("val2014"))
    assert locate("coco2014val", fetch=True) == ("images", cache / "datasets" / "val2014")
    assert files(cache / "datasets") == ["val2014", "val2014/a.jpg", "val2014/b.jpg"]
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("fetched again"))
    locate("coco2014val", fetch=True)


def test_other_files_are_kept_as_they_are(served, cache):
    entry = served("cifar10", b"an archive")
    option, path = locate("cifar10", fetch=True)
    assert option == "images" and path == entry.file and path.read_bytes() == b"an archive"
    assert files(cache / "datasets") == ["cifar-10-python.tar.gz"]


def test_without_a_published_sum_the_measured_one_is_printed(served, capsys):
    served("imagenet256", b"a batch")
    assert locate("imagenet256", fetch=True)[0] == "npz"
    assert hashlib.sha256(b"a batch").hexdigest() in capsys.readouterr().err


@pytest.mark.parametrize(("name", "kind"), [("coco2014val", "SHA-256"), ("cifar10", "MD5")])
def test_wrong_sum_is_one_sentence_and_leaves_nothing(name, kind, served, cache):
    true = DATASETS[name]
    entry = served(name, zipped("val2014"), md5=true.md5, sha256=true.sha256)
    with pytest.raises(UserError, match=f"wrong {kind}") as caught:
        locate(name, fetch=True)
    assert entry.url in str(caught.value) and "--images" in str(caught.value) and "\n" not in str(caught.value)
    assert files(cache) == ["datasets"]


def test_failed_download_is_one_sentence_and_leaves_nothing(served, cache):
    entry = served("coco2014val", b"", url="http://127.0.0.1:9/val2014.zip")
    with pytest.raises(UserError, match="cannot be downloaded") as caught:
        fetch_dataset(entry)
    assert "by hand" in str(caught.value) and "\n" not in str(caught.value)
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"no archive", zipped("train2014"), zipped("val2014")[:-30]])
def test_archive_that_cannot_be_unpacked_leaves_no_folder(content, served, cache):
    served("coco2014val", content)
    with pytest.raises(UserError, match="cannot be unpacked") as caught:
        locate("coco2014val", fetch=True)
    assert "\n" not in str(caught.value)
    assert files(cache / "datasets") == ["val2014.zip"]  # it has the right sum; perhaps the disk was full


def test_archive_fetched_by_hand_is_checked_and_unpacked(served, cache, offline):
    content = zipped("val2014")
    entry = served("coco2014val", content)
    entry.file.parent.mkdir(parents=True)
    entry.file.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"wrong SHA-256 .* delete it"):
        locate("coco2014val", fetch=True)
    entry.file.write_bytes(content)
    assert locate("coco2014val", fetch=True)[1] == entry.cached
    assert files(cache / "datasets") == ["val2014", "val2014/a.jpg", "val2014/b.jpg"]


# --- Opening


@pytest.fixture
def cifar(monkeypatch):
    """A CIFAR-10 of two images per batch, with sums that torchvision accepts: file name → bytes, and the pixels."""
    pixels = random_pixels(10, 3, 32, 32)
    batches, sums = {}, []
    for i, (name, _) in enumerate(CIFAR10.train_list):
        part = pixels[2 * i : 2 * i + 2].reshape(2, -1)
        batches[name] = pickle.dumps({"data": part, "labels": [0, 1]})
        sums.append([name, hashlib.md5(batches[name]).hexdigest()])
    monkeypatch.setattr(CIFAR10, "train_list", sums)
    return batches, pixels.transpose(0, 2, 3, 1)


def write_tar(path: Path, batches: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in {**batches, "test_batch": b"not read"}.items():
            member = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("form", ["tar.gz", "folder", "parent", "png", "npz"])
def test_cifar10_is_read_in_every_form(form, cifar, tmp_path):
    batches, pixels = cifar
    option, path = "images", tmp_path / "cifar"
    if form == "tar.gz":
        path = write_tar(tmp_path / "cifar-10-python.tar.gz", batches)
    elif form == "png":
        write_images(path / "train", pixels)
    elif form == "npz":
        option, path = "npz", tmp_path / "cifar.npz"
        np.savez(path, pixels)
    else:
        folder = path / CIFAR10.base_folder
        folder.mkdir(parents=True)
        for name, data in batches.items():
            (folder / name).write_bytes(data)
        path = folder if form == "folder" else path
    images = open_dataset("cifar10", option, path)
    assert len(images) == 10 and np.array_equal(all_of(images), pixels)


def test_changed_cifar10_is_refused_before_it_is_unpickled(cifar, tmp_path, monkeypatch):
    batches, _ = cifar
    monkeypatch.setattr(dataset_images.pickle, "loads", lambda *a, **k: pytest.fail("unpickled"))
    first = next(iter(batches))
    path = write_tar(tmp_path / "cifar.tar.gz", {**batches, first: batches[first] + b"."})
    with pytest.raises(UserError, match=r"data_batch_1 of .* wrong MD5"):
        open_dataset("cifar10", "images", path)


def test_incomplete_or_damaged_cifar10_is_one_sentence(cifar, tmp_path):
    batches, _ = cifar
    path = write_tar(tmp_path / "cifar.tar.gz", dict(list(batches.items())[:4]))
    with pytest.raises(UserError, match="has no file data_batch_5 of CIFAR-10"):
        open_dataset("cifar10", "images", path)
    whole = write_tar(tmp_path / "whole.tar.gz", batches).read_bytes()
    tar = gzip.decompress(whole)
    for content in (b"no archive", whole[: len(whole) // 2], whole[:1000] + b"\0" * 50 + whole[1050:], tar[:700]):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_dataset("cifar10", "images", path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_lsun_is_the_same_from_an_lmdb_and_from_a_folder_of_its_files(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    images = [random_pixels(301, 402, 3), random_pixels(257, 256, 3)]
    folder = write_images(tmp_path / "exported" / "0" / "0", images)
    environment = lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for path in folder.iterdir():
            transaction.put(path.stem.encode(), path.read_bytes())
    environment.close()
    both = [
        open_dataset("lsun_church", "lmdb", tmp_path / "lmdb"),
        open_dataset("lsun_church", "images", tmp_path / "exported"),
    ]
    assert isinstance(both[0], LmdbImages) and isinstance(both[1], FolderImages)
    assert both[0].sha256() == both[1].sha256()
    expected = Image.fromarray(ldm_square(images[0])).resize((256, 256), Image.Resampling.BICUBIC)
    assert np.array_equal(all_of(both[0])[0], np.asarray(expected))


def test_coco_is_512_on_a_side(tmp_path):
    write_images(tmp_path, [random_pixels(48, 64, 3)], "jpg")
    assert all_of(open_dataset("coco2014val", "images", tmp_path)).shape == (1, 512, 512, 3)


def test_images_of_another_size_are_refused(tmp_path):
    np.savez(tmp_path / "images.npz", random_pixels(2, 64, 48, 3))
    with pytest.raises(UserError, match="are 48×64 pixels, those of imagenet256 are 256×256"):
        open_dataset("imagenet256", "npz", tmp_path / "images.npz")


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 50])
def test_first_images(batch_size, tmp_path):
    pixels = random_pixels(7, 32, 32, 3)
    np.savez(tmp_path / "images.npz", pixels)
    images = open_dataset("cifar10", "npz", tmp_path / "images.npz", most=3)
    assert isinstance(images, FirstImages) and len(images) == 3
    batches = list(images.batches(batch_size))
    assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1).numpy(), pixels[:3])
    assert max(len(b) for b in batches) <= batch_size
    assert images.sha256() == ArrayImages(torch.from_numpy(pixels[:3])).sha256()
    whole = open_dataset("cifar10", "npz", tmp_path / "images.npz", most=7)
    assert isinstance(whole, NpzImages)
    assert len({images.fingerprint(), FirstImages(whole, 4).fingerprint(), whole.fingerprint()}) == 3


# --- ADM's reference batch: published mean and covariance, features of its images


@pytest.fixture
def adm(tmp_path, monkeypatch):
    """A file like ADM's, of 3 images 256×256, with statistics as if the digits classifier had made them."""
    monkeypatch.setattr(reference, "FOREIGN_EXTRACTOR", "digits-classifier")
    monkeypatch.setattr(reference, "FOREIGN_SIZES", {"": 64, "_s": 5})
    path = tmp_path / "VIRTUAL.npz"
    arrays = {"mu": np.arange(64.0), "sigma": np.eye(64), "mu_s": np.arange(5.0), "sigma_s": 2 * np.eye(5)}
    np.savez(path, arr_0=random_pixels(3, 256, 256, 3), **arrays)
    return path, arrays


def test_adms_statistics_are_taken_over_and_features_computed(adm, extractor, tmp_path):
    path, arrays = adm
    images = open_dataset("imagenet256", "npz", path)
    made = dataset_reference("imagenet256", path, images, "a title", extractor, progress=False)
    reference.save_reference(made, tmp_path / "made.npz")
    loaded = reference.load_reference(tmp_path / "made.npz", extractor)
    assert loaded.name == "a title" and loaded.features.shape == (3, 64)
    found = (loaded.gaussian.mu, loaded.gaussian.sigma, loaded.spatial.mu, loaded.spatial.sigma)
    for value, expected in zip(found, arrays.values(), strict=True):
        assert np.array_equal(value, expected)
    own = reference.compute_reference(images, extractor, "", progress=False)  # planted: of the 3 images alone
    assert np.array_equal(own.features, loaded.features) and not np.allclose(own.gaussian.mu, arrays["mu"])


def test_adms_statistics_belong_to_inception(adm, extractor, monkeypatch):
    path, _ = adm
    monkeypatch.setattr(reference, "FOREIGN_EXTRACTOR", "inception-v3-compat")
    with pytest.raises(UserError, match="inception-v3-compat"):
        dataset_reference("imagenet256", path, open_dataset("imagenet256", "npz", path), "", extractor)


def test_reference_batch_without_statistics_is_refused(extractor, tmp_path):
    np.savez(tmp_path / "samples.npz", random_pixels(2, 256, 256, 3))
    images = open_dataset("imagenet256", "npz", tmp_path / "samples.npz")
    with pytest.raises(UserError, match="does not hold reference statistics"):
        dataset_reference("imagenet256", tmp_path / "samples.npz", images, "", extractor)
