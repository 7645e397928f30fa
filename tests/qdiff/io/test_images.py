"""Samples become 8-bit images by one rule, and files appear whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qdiff.errors import UserError
from qdiff.io.files import check_writable, sha256, written_whole
from qdiff.io.images import grid, load_png, png_shape, save_png, to_uint8


def test_to_uint8_clamps_scales_and_rounds():
    values = [-7.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.0, 1 - 0.6 / 127.5, 1.0, 7.0]
    made = to_uint8(torch.tensor(values).reshape(1, 1, 1, 8))
    # 0 is exactly between 127 and 128, and rounds to the even one.
    assert made.dtype == np.uint8 and made.ravel().tolist() == [0, 0, 0, 1, 128, 254, 255, 255]


def test_to_uint8_puts_channels_last():
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 127.5 - 1
    made = to_uint8(x.double().requires_grad_())
    assert made.shape == (2, 4, 5, 3)
    np.testing.assert_array_equal(made, np.arange(120).reshape(2, 3, 4, 5).transpose(0, 2, 3, 1))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_round_trip(channels, mode, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 7, channels), dtype=np.uint8)
    save_png(image, tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as opened:
        assert (opened.format, opened.mode, opened.size) == ("PNG", mode, (7, 6))
    np.testing.assert_array_equal(load_png(tmp_path / "new" / "a.png"), image)


def test_png_of_one_column_keeps_its_shape(tmp_path):
    image = np.arange(4, dtype=np.uint8).reshape(4, 1, 1)
    save_png(image, tmp_path / "a.png")
    np.testing.assert_array_equal(load_png(tmp_path / "a.png"), image)


def test_grid_places_images_row_by_row():
    images = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1)
    made = grid(images)[..., 0]
    white = 255
    expected = [[1, white, 2, white, 3], [white] * 5, [4, white, 5, white, white]]
    assert made.tolist() == expected
    assert grid(images, columns=5)[..., 0].tolist() == [[1, white, 2, white, 3, white, 4, white, 5]]


def test_grid_enlarges_by_repeating():
    made = grid(np.array([[[[1], [2]]]], dtype=np.uint8), scale=2)
    assert made[..., 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_written_whole_appears_at_the_end(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with written_whole(target) as temporary:
        temporary.write_text("complete")
        assert not target.exists() and temporary.parent == target.parent
        assert temporary.suffix == ".part" and temporary.name.startswith(".")
    assert target.read_text() == "complete"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_written_whole_keeps_the_old_file_on_an_error(error, tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(error), written_whole(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_check_writable_leaves_nothing(tmp_path):
    check_writable(tmp_path / "not" / "yet" / "there.txt")
    (tmp_path / "file").write_text("old")
    check_writable(tmp_path / "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"


def test_check_writable_refuses_what_even_root_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "below", tmp_path / "file" / "two" / "below", "/proc/qdiff/file"):
        with pytest.raises(UserError, match="cannot be written"):
            check_writable(path)


def test_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_shape_of_whole_files_alone(tmp_path):
    path = tmp_path / "a.png"
    for channels in (1, 3):
        save_png(np.full((4, 5, channels), 7, dtype=np.uint8), path)
        assert png_shape(path) == (4, 5, channels)
    data = path.read_bytes()
    for number in range(len(data)):
        path.write_bytes(data[:number])
        assert png_shape(path) is None
        path.write_bytes(data[:number] + bytes([data[number] ^ 1]) + data[number + 1 :])
        assert png_shape(path) is None
