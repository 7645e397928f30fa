"""Read and write samples as images."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from qdiff.io.files import written_whole

_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # end of every PNG file
_CHANNELS = {"L": 1, "RGB": 3}  # by Pillow's name of the mode


def to_uint8(x: Tensor) -> np.ndarray:
    """Turn samples [N, C, H, W] in [−1, 1] into uint8 [N, H, W, C]: clamp, scale to 0…255, round to nearest."""
    scaled = ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.byte().permute(0, 2, 3, 1).cpu().numpy()


def save_png(image: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, C] with 1 or 3 channels, atomically."""
    with written_whole(path) as temporary:
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(temporary, format="PNG")


def load_png(path: Path) -> np.ndarray:
    """Read uint8 [H, W, C]."""
    with Image.open(path) as image:
        array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def png_shape(path: Path) -> tuple[int, int, int] | None:
    """Return (H, W, C) of a file written by `save_png`; None if it is damaged or of another kind.

    The checksums of its chunks are checked; pixels are not decoded.
    """
    try:
        data = path.read_bytes()
        if not data.endswith(_END):  # Pillow does not check the end
            return None
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            shape = image.height, image.width, _CHANNELS[image.mode]
            image.verify()
    except Exception:  # the reader can raise anything for bytes that are not a PNG file
        return None
    return shape


def grid(images: np.ndarray, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """Tile uint8 [N, H, W, C] into one image with one white pixel in between, enlarged by repeating pixels."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, c = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (h + 1) - 1, columns * (w + 1) - 1, c), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        canvas[top : top + h, left : left + w] = image
    return canvas
