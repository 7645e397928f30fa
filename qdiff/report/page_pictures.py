"""The pictures of a page as data URIs: a grid of each row's images, its difference from float, and a strip."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qdiff.evaluation.column import Row
from qdiff.io.images import grid, load_png
from qdiff.report.metric_axes import is_float

SHOWN = 24
COLUMNS = 6
STRIP = 8  # images
AMPLIFIED = 4
PIXEL_ART = 64  # up to this width in pixels, every pixel is kept and shown as a square
SHRUNK_TO = 128  # width in pixels of larger images in a grid, so that twenty rows stay below 15 MB
STRIP_SHRUNK_TO = 64  # in a strip
PANEL = 396  # CSS pixels; three panels fit next to each other
_JPEG_QUALITY = 85
_STRIP_JPEG_QUALITY = 92  # of small images too, so that six tables stay below 2 MB; the grids are exact


@dataclass(frozen=True)
class Picture:
    """A grid of images as a data URI, with its display size in CSS pixels."""

    uri: str
    width: int
    height: int
    pixelated: bool


def grids(rows: Sequence[Row], folders: dict[str, Path]) -> tuple[list[dict[str, Picture]], int]:
    """Return each row's pictures by name, and the number of images per picture.

    The names are "images" and, for quantized rows, "difference": the amplified absolute difference from float.

    Args:
        rows: rows of the table.
        folders: label of a row → its images.
    """
    with_images = _with_images(rows, folders)
    numbers = _numbers(with_images.values(), SHOWN)
    float_row = next((i for i in with_images if is_float(rows[i])), None)
    float_images = None if float_row is None else _load(with_images[float_row], numbers)
    pictures: list[dict[str, Picture]] = [{} for _ in rows]
    for i, folder in with_images.items():
        images = _load(folder, numbers)
        pictures[i]["images"] = _picture(images)
        if float_images is not None and not is_float(rows[i]) and images.shape == float_images.shape:
            difference = np.abs(images.astype(np.int16) - float_images) * AMPLIFIED
            pictures[i]["difference"] = _picture(difference.clip(0, 255).astype(np.uint8))
    return pictures, len(numbers)


def strips(rows: Sequence[Row], folders: dict[str, Path]) -> list[tuple[str, Picture]]:
    """Return (label, its first images in one line) of every row with images."""
    with_images = _with_images(rows, folders)
    numbers = _numbers(with_images.values(), STRIP)
    return [(rows[i]["label"], _strip(_load(folder, numbers))) for i, folder in with_images.items()]


def _with_images(rows: Sequence[Row], folders: dict[str, Path]) -> dict[int, Path]:
    return {
        i: folders[row["label"]]
        for i, row in enumerate(rows)
        if row["label"] in folders and (folders[row["label"]] / _name(0)).is_file()
    }


def _numbers(folders: Any, count: int) -> list[int]:
    """Return which of the first images every row has, so that all pictures show the same ones."""
    return [i for i in range(count) if all((folder / _name(i)).is_file() for folder in folders)]


def _name(number: int) -> str:
    return f"{number:05d}.png"


def _load(folder: Path, numbers: Sequence[int]) -> np.ndarray:
    return np.stack([load_png(folder / _name(i)) for i in numbers])


def _picture(images: np.ndarray) -> Picture:
    """Return the images [N, H, W, C] as one picture: small ones exactly, large ones shrunk."""
    small = max(images.shape[1:3]) <= PIXEL_ART
    if not small:
        images = np.stack([_shrunk(image, SHRUNK_TO) for image in images])
    return _tiled(images, COLUMNS, small, None if small else _JPEG_QUALITY)


def _strip(images: np.ndarray) -> Picture:
    """Return the images [N, H, W, C] side by side."""
    small = max(images.shape[1:3]) <= PIXEL_ART
    if not small:
        images = np.stack([_shrunk(image, STRIP_SHRUNK_TO) for image in images])
    return _tiled(images, STRIP, small, _STRIP_JPEG_QUALITY)


def _tiled(images: np.ndarray, columns: int, pixelated: bool, jpeg_quality: int | None) -> Picture:
    """Return the images as PNG, or as JPEG if that is allowed and takes less."""
    tiled = grid(images, columns=columns)
    picture = Image.fromarray(tiled.squeeze(-1) if tiled.shape[-1] == 1 else tiled)
    encoded = [("png", _encoded(picture, "PNG", optimize=True))]
    if jpeg_quality is not None and picture.mode in ("L", "RGB"):
        encoded.append(("jpeg", _encoded(picture, "JPEG", quality=jpeg_quality, optimize=True)))
    kind, data = min(encoded, key=lambda pair: len(pair[1]))
    scale = max(1, PANEL // picture.width) if pixelated else 1
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, picture.width * scale, picture.height * scale, pixelated)


def _shrunk(image: np.ndarray, shrunk_to: int) -> np.ndarray:
    whole = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    factor = shrunk_to / max(whole.size)
    array = np.asarray(whole.resize([max(1, round(side * factor)) for side in whole.size], Image.Resampling.BOX))
    return array[..., None] if array.ndim == 2 else array


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()
