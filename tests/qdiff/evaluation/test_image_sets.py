"""Sets of images: folders, array files and arrays give the same pixels, and bad files are one sentence."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from qdiff.errors import UserError
from qdiff.evaluation.image_sets import ArrayImages, FolderImages, NpzImages, open_images


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)


def write(images, folder, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02}.{suffix}")
    return folder


def all_of(images, batch_size=3) -> np.ndarray:
    """Return uint8 [N, H, W, 3] of an image set, which must keep to the batch size."""
    batches = list(images.batches(batch_size))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert all(b.dtype == torch.uint8 for b in batches)
    found = torch.cat(batches).permute(0, 2, 3, 1).numpy()
    assert len(found) == len(images)
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_png_folder_npz_and_arrays_are_the_same_pixels(batch_size, pixels, tmp_path):
    np.savez(tmp_path / "images.npz", pixels)
    sets = [
        FolderImages(write(pixels, tmp_path / "png")),
        NpzImages(tmp_path / "images.npz"),
        ArrayImages(torch.from_numpy(pixels)),
        ArrayImages(torch.from_numpy(pixels).permute(0, 3, 1, 2)),
    ]
    for images in sets:
        assert np.array_equal(all_of(images, batch_size), pixels)
    assert len({images.sha256() for images in sets}) == 1
    changed = pixels.copy()
    changed[-1, -1, -1, -1] ^= 1
    assert ArrayImages(torch.from_numpy(changed)).sha256() != sets[0].sha256()


def test_jpeg_folder_is_what_pillow_decodes(pixels, tmp_path):
    folder = write(pixels, tmp_path / "jpeg", "jpg")
    expected = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.iterdir())])
    assert np.array_equal(all_of(FolderImages(folder)), expected)
    assert not np.array_equal(expected, pixels)


def test_upper_case_suffixes_count_and_other_and_hidden_files_do_not(pixels, tmp_path):
    folder = write(pixels[:2], tmp_path / "mixed")
    (folder / "00.png").rename(folder / "00.PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / ".01.png.part").write_text("half-written")
    (folder / "._01.png").write_text("what macOS leaves")
    assert np.array_equal(all_of(FolderImages(folder)), pixels[:2])


def test_grey_palette_and_transparent_files_become_rgb(tmp_path):
    values = np.arange(30, dtype=np.uint8).reshape(6, 5)
    grey = Image.fromarray(values)
    grey.save(tmp_path / "a.png")
    grey.convert("P").save(tmp_path / "b.png")
    grey.convert("LA").save(tmp_path / "c.png")
    expected = np.repeat(values[..., None], 3, axis=2)
    assert np.array_equal(all_of(FolderImages(tmp_path)), np.stack([expected] * 3))


def test_folders_of_classes_are_read_by_path(pixels, tmp_path):
    write(pixels[:3], tmp_path / "a")
    write(pixels[3:], tmp_path / "b" / "c")
    write(pixels[:1], tmp_path / ".thumbnails")
    (tmp_path / "b" / "set.npz").write_bytes(b"")
    (tmp_path / "b" / "folder.png").mkdir()
    for images in (FolderImages(tmp_path), FolderImages(tmp_path, recursive=True)):
        assert np.array_equal(all_of(images), pixels) and images.left_out == 0
    assert [str(p.relative_to(tmp_path)) for p in images.paths][2:4] == ["a/02.png", "b/c/00.png"]


def test_images_directly_in_a_folder_are_the_set_and_the_rest_is_counted(pixels, tmp_path):
    folder = write(pixels[:3], tmp_path / "set")
    write(pixels[3:5], folder / "grids")
    direct, everything = FolderImages(folder), FolderImages(folder, recursive=True)
    assert np.array_equal(all_of(direct), pixels[:3]) and direct.left_out == 2
    assert np.array_equal(all_of(everything), pixels[:5]) and everything.left_out == 0


def test_linked_class_folders_count_once_and_circles_end(pixels, tmp_path):
    classes = write(pixels[:3], tmp_path / "elsewhere" / "n01")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "n01").symlink_to(classes)
    (folder / "n01-again").symlink_to(classes)
    (classes / "up").symlink_to(folder)
    assert np.array_equal(all_of(FolderImages(folder)), pixels[:3])


def test_images_of_another_size_below_are_named_by_their_path(pixels, tmp_path):
    write(pixels[:1], tmp_path / "a")
    write(pixels[:1, :4], tmp_path / "b")
    with pytest.raises(UserError, match=r"b/00\.png is 5×4 pixels but a/00\.png is 5×6"):
        list(FolderImages(tmp_path).batches(2))


def test_a_folder_that_cannot_be_read_is_named(pixels, tmp_path, monkeypatch):
    write(pixels[:1], tmp_path / "a")

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(UserError, match="cannot be read"):
        FolderImages(tmp_path)


class Flipped:
    def __call__(self, image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def __repr__(self):
        return "Flipped()"


def test_prepare_is_applied_and_part_of_the_fingerprint(pixels, tmp_path):
    folder = write(pixels, tmp_path / "png")
    plain, flipped = FolderImages(folder), FolderImages(folder, Flipped())
    assert np.array_equal(all_of(flipped), pixels[:, :, ::-1])
    assert plain.fingerprint() != flipped.fingerprint() == FolderImages(folder, Flipped()).fingerprint()


def test_prepare_may_make_sizes_equal(pixels, tmp_path):
    write(pixels[:1], tmp_path)
    Image.fromarray(pixels[1][:4]).save(tmp_path / "other.png")
    with pytest.raises(UserError, match=r"other\.png is 5×4 pixels but 00.png is 5×6"):
        list(FolderImages(tmp_path).batches(2))
    with pytest.raises(UserError, match="5×4"):  # also where they come in different batches
        list(FolderImages(tmp_path).batches(1))
    assert all_of(FolderImages(tmp_path, lambda image: image.crop((0, 0, 4, 4)))).shape == (2, 4, 4, 3)


def test_fingerprint_tells_changed_files(pixels, tmp_path):
    folder = write(pixels, tmp_path / "png")
    before = FolderImages(folder).fingerprint()
    assert FolderImages(folder).fingerprint() == before
    Image.fromarray(pixels[0]).save(folder / "03.png")
    assert FolderImages(folder).fingerprint() != before


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no readable image"), (b"nonsense", "no readable image"), (None, "no readable image"), ("16", "16 bits")],
)
def test_bad_image_files_are_named(content, says, pixels, tmp_path):
    folder = write(pixels, tmp_path / "png")
    bad = folder / "04.png"
    if content is None:  # truncated
        bad.write_bytes(bad.read_bytes()[:60])
    elif content == "16":
        Image.fromarray(np.zeros((6, 5), dtype=np.uint16)).save(bad)
    else:
        bad.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        list(FolderImages(folder).batches(3))
    assert str(bad) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        FolderImages(tmp_path / "none")


# --- .npz


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_is_read_in_batches_as_numpy_reads_it(compressed, channels, pixels, tmp_path):
    path = tmp_path / "images.npz"
    # ADM's file has other arrays too, before and after.
    arrays = {"mu": np.zeros(3), "arr_0": pixels[..., :channels], "arr_1": np.arange(7)}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    expected = np.load(path)["arr_0"]
    images = NpzImages(path)
    assert len(images) == 7 and np.array_equal(all_of(images, 2), np.broadcast_to(expected, pixels.shape))
    assert np.array_equal(all_of(images, 2), np.broadcast_to(expected, pixels.shape))  # a second time as well


def test_npz_is_not_read_whole(pixels, tmp_path, monkeypatch):
    np.savez(tmp_path / "images.npz", pixels)
    asked = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: asked.append(n) or read(self, n))
    next(NpzImages(tmp_path / "images.npz").batches(2))
    assert max(asked) <= 2 * pixels[0].size and min(asked) >= 0  # -1 would be all


@pytest.mark.parametrize("keep", [0, 10, 300, -200])
def test_truncated_npz_is_one_sentence(keep, pixels, tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, pixels)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError) as caught:
        list(NpzImages(path).batches(2))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_npz_whose_header_promises_more_than_it_holds(pixels, tmp_path):
    path = tmp_path / "images.npz"
    np.save(tmp_path / "whole.npy", pixels)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "whole.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match="in the middle of its images"):
        list(NpzImages(path).batches(2))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 4, 4, 3)), "float64"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"\[2, 3, 4, 4\]"),
        (np.zeros((2, 4, 4), np.uint8), r"\[2, 4, 4\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"\[0, 4, 4, 3\]"),
        (np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8)), "uint8"),
    ],
)
def test_npz_of_other_arrays_is_refused(array, says, tmp_path):
    np.savez(tmp_path / "images.npz", array)
    with pytest.raises(UserError, match=says):
        NpzImages(tmp_path / "images.npz")


def test_npz_without_images_is_refused(tmp_path):
    np.savez(tmp_path / "images.npz", mu=np.zeros(3))
    with pytest.raises(UserError, match="holds no array arr_0"):
        NpzImages(tmp_path / "images.npz")
    with pytest.raises(UserError, match="no file"):
        NpzImages(tmp_path / "none.npz")


# --- open_images


def test_open_images_takes_each_kind(pixels, tmp_path):
    np.savez(tmp_path / "images.npz", pixels)
    folder = write(pixels, tmp_path / "png")
    kinds = {
        NpzImages: tmp_path / "images.npz",
        FolderImages: str(folder),
        ArrayImages: pixels,
    }
    for kind, what in kinds.items():
        assert type(open_images(what)) is kind
    assert type(open_images(torch.from_numpy(pixels))) is ArrayImages
    images = FolderImages(folder)
    assert open_images(images) is images


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "must be uint8"),
        (np.zeros((4, 4, 3), np.uint8), r"\[N, H, W, C\]"),
        (np.zeros((2, 3, 4, 3), np.uint8), r"\[N, H, W, C\]"),  # channels on both sides
        (np.zeros((0, 4, 4, 3), np.uint8), r"\[N, H, W, C\]"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array, says):
    with pytest.raises(UserError, match=says):
        open_images(array)
