"""Images that the tests of published data sets make up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder: Path, images, suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:02}.{suffix}")
    return folder


def ldm_square(pixels: np.ndarray, shift: int = 0) -> np.ndarray:
    """Crop as ldm/data/lsun.py does: from (side − crop) // 2 to (side + crop) // 2 on the array."""
    height, width = pixels.shape[:2]
    crop = min(height, width)
    rows = slice((height - crop) // 2 + shift * (height > crop), (height + crop) // 2 + shift * (height > crop))
    columns = slice((width - crop) // 2 + shift * (width > crop), (width + crop) // 2 + shift * (width > crop))
    return pixels[rows, columns]
