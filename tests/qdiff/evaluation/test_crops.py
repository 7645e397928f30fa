"""Images of published data sets are cropped and resized as LDM does it."""

from __future__ import annotations

import numpy as np
import pytest
from dataset_files import ldm_square, random_pixels, write_images
from PIL import Image

from qdiff.evaluation.datasets import CropResize
from qdiff.evaluation.image_sets import FolderImages

SIZES = [(301, 401), (301, 402), (402, 301), (300, 301), (301, 300), (256, 341), (341, 256), (256, 256), (5, 8)]


def bicubic(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize [H, W, 3] by the definition of Pillow's filter in float64: cubic with a = −½, widened when shrinking."""

    def weights(length: int) -> np.ndarray:
        scale = length / size
        support = max(scale, 1.0)
        centre = (np.arange(size) + 0.5) * scale
        x = np.abs((np.arange(length)[None] + 0.5 - centre[:, None]) / support)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        kernel = np.where(x < 1, near, np.where(x < 2, far, 0))
        return kernel / kernel.sum(1, keepdims=True)

    def rounded(values: np.ndarray) -> np.ndarray:  # Pillow rounds to 8 bits after each of its two passes
        return np.clip(np.floor(values + 0.5), 0, 255)

    across = rounded(np.einsum("ow,hwc->hoc", weights(pixels.shape[1]), pixels.astype(np.float64)))
    return rounded(np.einsum("oh,hwc->owc", weights(pixels.shape[0]), across)).astype(np.uint8)


# Pillow's weights have 22 bits after the point: a value that lies on a half may be rounded to either side.
RESIZE_TOLERANCE = 1
PLANTED = 5 * RESIZE_TOLERANCE  # errors below change some pixel by 11 at least


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crop_is_ldms_on_odd_and_even_sides(size):
    pixels = random_pixels(*size, 3)
    prepared = np.asarray(CropResize(64)(Image.fromarray(pixels)))
    square = Image.fromarray(ldm_square(pixels))
    assert square.size[0] == square.size[1] == min(size)
    assert np.array_equal(prepared, np.asarray(square.resize((64, 64), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resize_is_the_antialiased_bicubic_filter(size):
    pixels = random_pixels(*size, 3)
    prepared = np.asarray(CropResize(64)(Image.fromarray(pixels))).astype(int)
    assert np.abs(prepared - bicubic(ldm_square(pixels), 64)).max() <= RESIZE_TOLERANCE


@pytest.mark.parametrize("shift", [-1, 1])
def test_planted_crop_that_is_off_by_one_pixel_would_be_noticed(shift):
    pixels = random_pixels(301, 402, 3)
    prepared = np.asarray(CropResize(64)(Image.fromarray(pixels))).astype(int)
    assert np.abs(prepared - bicubic(ldm_square(pixels, shift), 64)).max() > PLANTED
    image = Image.fromarray(ldm_square(pixels))
    for other in (Image.Resampling.BILINEAR, Image.Resampling.LANCZOS, Image.Resampling.NEAREST):
        assert np.abs(prepared - np.asarray(image.resize((64, 64), other))).max() > PLANTED


def test_torchvisions_crop_is_another_one():
    from torchvision.transforms import CenterCrop

    pixels = random_pixels(4, 7, 3)  # (7 − 4) / 2 = 1.5: LDM starts at 1, torchvision at 2
    assert not np.array_equal(np.asarray(CenterCrop(4)(Image.fromarray(pixels))), ldm_square(pixels))
    assert np.array_equal(np.asarray(CropResize(4)(Image.fromarray(pixels))), ldm_square(pixels))


def test_crop_has_a_stable_name_for_fingerprints(tmp_path):
    folder = write_images(tmp_path / "a", [random_pixels(5, 8, 3)])
    assert FolderImages(folder, CropResize(4)).fingerprint() == FolderImages(folder, CropResize(4)).fingerprint()
    assert FolderImages(folder, CropResize(4)).fingerprint() != FolderImages(folder, CropResize(5)).fingerprint()
