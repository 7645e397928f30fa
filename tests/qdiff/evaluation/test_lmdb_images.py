"""LSUN's LMDBs: every entry, by key, decoded and prepared; damaged ones are one sentence, not a crash."""

from __future__ import annotations

import builtins
import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from qdiff.errors import UserError
from qdiff.evaluation.datasets import CropResize
from qdiff.evaluation.lmdb_images import HASHED_AT_EACH_END, LmdbImages

lmdb = pytest.importorskip("lmdb")


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=kind)
    return file.getvalue()


def make(folder, entries: dict[bytes, bytes]):
    environment = lmdb.open(str(folder), map_size=1 << 24)
    with environment.begin(write=True) as transaction:
        for key, data in entries.items():
            transaction.put(key, data)
    environment.close()
    return folder


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 12, 9, 3), dtype=np.uint8)


def all_of(images, batch_size=3) -> np.ndarray:
    return torch.cat(list(images.batches(batch_size))).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_entries_come_by_key_whatever_the_order_they_were_written_in(batch_size, pixels, tmp_path):
    order = [3, 0, 6, 1, 5, 2, 4]
    path = make(tmp_path / "train_lmdb", {f"{i:040x}".encode(): encoded(pixels[i]) for i in order})
    for where in (path, path / "data.mdb"):
        images = LmdbImages(where)
        assert len(images) == 7
        assert np.array_equal(all_of(images, batch_size), pixels)
        assert np.array_equal(all_of(images, batch_size), pixels)  # it can be read again
        del images


@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_lossy_entries_are_what_pillow_decodes(kind, pixels, tmp_path):
    data = [encoded(p, kind) for p in pixels]
    images = LmdbImages(make(tmp_path / "lmdb", {b"%d" % i: d for i, d in enumerate(data)}))
    expected = np.stack([np.asarray(Image.open(io.BytesIO(d)).convert("RGB")) for d in data])
    assert np.array_equal(all_of(images), expected)


def test_prepare_makes_sizes_equal(pixels, tmp_path):
    path = make(tmp_path / "lmdb", {b"a": encoded(pixels[0]), b"b": encoded(pixels[1][:8])})
    with pytest.raises(UserError, match=r"'b'.* is 9×8 pixels but those before it are 9×12"):
        list(LmdbImages(path).batches(2))
    assert all_of(LmdbImages(path, CropResize(4))).shape == (2, 4, 4, 3)


def test_half_read_and_nested_readers_do_not_disturb(pixels, tmp_path):
    images = LmdbImages(make(tmp_path / "lmdb", {b"%d" % i: encoded(p) for i, p in enumerate(pixels)}))
    outer = images.batches(2)
    next(outer)
    assert np.array_equal(all_of(images), pixels)
    assert np.array_equal(next(outer).permute(0, 2, 3, 1).numpy(), pixels[2:4])
    outer.close()
    assert np.array_equal(all_of(images), pixels)


def test_nothing_is_written_beside_the_data(pixels, tmp_path):
    path = make(tmp_path / "lmdb", {b"a": encoded(pixels[0])})
    (path / "lock.mdb").unlink()
    before = (path / "data.mdb").read_bytes()
    all_of(LmdbImages(path))
    assert [p.name for p in path.iterdir()] == ["data.mdb"] and (path / "data.mdb").read_bytes() == before


def test_fingerprint_tells_ends_counts_and_preparation_and_not_the_middle(pixels, tmp_path):
    count = 2 * HASHED_AT_EACH_END + 2
    entries = {b"%03d" % i: encoded(pixels[i % 7]) for i in range(count)}

    def fingerprint(name, prepare=None, **changes):
        changed = {k: v for k, v in (entries | {f.encode(): d for f, d in changes.items()}).items() if v is not None}
        return LmdbImages(make(tmp_path / name, changed), prepare).fingerprint()

    same_size = encoded(pixels[0])  # random pixels compress alike, so only their values tell
    first = fingerprint("a")
    assert fingerprint("b") == first
    others = [
        fingerprint("c", CropResize(4)),
        fingerprint("d", **{"000": same_size[:-1] + b"x"}),
        fingerprint("e", **{f"{count - 1:03d}": same_size[:-1] + b"x"}),
        fingerprint("f", **{f"{count // 2:03d}": None}),
    ]
    assert len({first, *others}) == 5
    middle = f"{count // 2:03d}"  # as the docstring says
    assert fingerprint("g", **{middle: entries[middle.encode()][:-1] + b"x"}) == first


def test_undecodable_entry_is_named(pixels, tmp_path):
    path = make(tmp_path / "lmdb", {b"a": encoded(pixels[0]), b"length": b"7"})
    with pytest.raises(UserError, match=r"the entry 'length' of .*lmdb is no readable image"):
        list(LmdbImages(path).batches(2))


@pytest.mark.parametrize("keep", [0, 100, 5000, 8192, -4096])
def test_truncated_files_are_one_sentence(keep, pixels, tmp_path):
    path = make(tmp_path / "lmdb", {b"%d" % i: encoded(p) for i, p in enumerate(pixels)})
    file = path / "data.mdb"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"truncated|cannot be opened") as caught:
        list(LmdbImages(path).batches(2))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_lmdb_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no LMDB"):
        LmdbImages(tmp_path / "none")
    with pytest.raises(UserError, match=r"data\.mdb"):
        LmdbImages(tmp_path)
    (tmp_path / "data.mdb").write_bytes(b"nonsense" * 4096)
    with pytest.raises(UserError, match="cannot be opened"):
        LmdbImages(tmp_path)
    with pytest.raises(UserError, match="is empty"):
        LmdbImages(make(tmp_path / "empty", {}))
    shutil.rmtree(tmp_path / "empty")


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_lmdb(name, *args, **kwargs):
        if name == "lmdb":
            raise ImportError("No module named 'lmdb'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_lmdb)
    with pytest.raises(UserError, match=r'pip install "\.\[lmdb\]"'):
        LmdbImages(tmp_path)
