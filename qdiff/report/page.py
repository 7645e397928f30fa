"""One self-contained web page of results: a sortable table, plots, and the same images of every row."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from qdiff.evaluation.column import LOWER, NOTHING, Row
from qdiff.io.files import written_whole
from qdiff.io.images import grid, load_png
from qdiff.report.activation_plots import activation_plots
from qdiff.report.columns import columns_of
from qdiff.report.metric_axes import bits, is_float, method_name, number, width
from qdiff.report.plots import legend, metric_plots

SHOWN = 24
COLUMNS = 6
AMPLIFIED = 4
PIXEL_ART = 64  # up to this width in pixels, every pixel is kept and shown as a square
SHRUNK_TO = 128  # width in pixels of larger images in the page, so that twenty rows stay below 15 MB
_PANEL = 396  # CSS pixels; three panels fit next to each other
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Cell:
    """One cell of the table; JavaScript sorts by ``number``, which is None for empty cells."""

    text: str
    number: str | None
    best: bool
    published: bool


@dataclass(frozen=True)
class Picture:
    """A grid of images as a data URI, with its display size in CSS pixels."""

    uri: str
    width: int
    height: int
    pixelated: bool


def write_page(
    path: Path,
    title: str,
    protocol: Sequence[tuple[str, str]],
    rows: Sequence[Row],
    folders: dict[str, Path],
    notes: Sequence[str] = (),
) -> None:
    """Write the page; the same input gives the same bytes.

    Args:
        path: the page; the write is atomic.
        title: the page's heading.
        protocol: names and values of the settings that all rows share, in the order shown.
        rows: numbers as in `qdiff.report.columns`, and ``method``, ``weight_bits`` and ``act_bits`` (32 is
            float), ``split``, ``images``, ``flags`` (sentences on what is wrong with the row) and ``command``; rows
            with modulation or dynamic ranges also have ``modulate``, ``ranges`` and ``ablation``.
        folders: label of a row → its images, from ``00000.png`` on; image i has the same noise in all rows. Rows
            without a folder, or whose folder has no ``00000.png``, are shown without images.
        notes: sentences below the table.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("qdiff.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    pictures, shown = _pictures(rows, folders)
    columns = columns_of(list(rows))
    text = environment.from_string(template).render(
        title=title,
        protocol=protocol,
        notes=notes,
        flags=[(i, row["label"], flag) for i, row in enumerate(rows) for flag in row.get("flags") or ()],
        columns=columns,
        lower=LOWER,
        # A column only if the rows differ; otherwise the protocol states the number.
        counts=len({row.get("images") for row in rows}) > 1,
        table=_table(rows),
        plots=metric_plots(rows),
        activation_plots=activation_plots(rows),
        legend=legend(rows),
        pictures=pictures,
        float_row=next((i for i, row in enumerate(rows) if is_float(row) and pictures[i]), None),
        shown=shown,
        amplified=AMPLIFIED,
        panel=_PANEL,
    )
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the values that the template shows per row."""
    by_column = []
    for column in columns_of(list(rows)):
        texts = [column.text(row) for row in rows]
        values = [None if text == NOTHING else number(column, row) for text, row in zip(texts, rows, strict=True)]
        rivals = [v for v, row in zip(values, rows, strict=True) if v is not None and not is_float(row)]
        # There is no best row unless another is worse; published numbers do not compete.
        best = None
        if len(set(rivals)) > 1 and not column.published:
            best = (min if column.better == LOWER else max)(rivals)
        by_column.append(
            [
                Cell(
                    text,
                    None if value is None else json.dumps(value),  # JavaScript's Infinity: PSNR of equal images
                    value is not None and value == best and not is_float(row),
                    column.published,
                )
                for text, value, row in zip(texts, values, rows, strict=True)
            ]
        )
    table = []
    for i, row in enumerate(rows):
        weights, activations = bits(row)
        table.append(
            {
                "label": row["label"],
                "method": method_name(row) + (", split" if row.get("split") else ""),
                "float": is_float(row),
                "width": "float" if is_float(row) else width(row),
                "bits": weights + activations / 100,  # sorts by weight bits, then by activation bits
                "images": row.get("images"),
                "cells": [cells[i] for cells in by_column],
                "flags": row.get("flags") or (),
                "command": row.get("command"),
            }
        )
    return table


def _pictures(rows: Sequence[Row], folders: dict[str, Path]) -> tuple[list[dict[str, Picture]], int]:
    """Return each row's pictures by name, and the number of images per picture.

    The names are "images" and, for quantized rows, "difference": the amplified absolute difference from float.
    """
    with_images = {
        i: folders[row["label"]]
        for i, row in enumerate(rows)
        if row["label"] in folders and (folders[row["label"]] / _name(0)).is_file()
    }
    # Only images that every row has, so all grids show the same ones.
    numbers = [i for i in range(SHOWN) if all((folder / _name(i)).is_file() for folder in with_images.values())]
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


def _name(number: int) -> str:
    return f"{number:05d}.png"


def _load(folder: Path, numbers: Sequence[int]) -> np.ndarray:
    return np.stack([load_png(folder / _name(i)) for i in numbers])


def _picture(images: np.ndarray) -> Picture:
    """Return the images [N, H, W, C] as one picture: small ones exactly, large ones shrunk."""
    small = max(images.shape[1:3]) <= PIXEL_ART
    if not small:
        images = np.stack([_shrunk(image) for image in images])
    tiled = grid(images, columns=COLUMNS)
    picture = Image.fromarray(tiled.squeeze(-1) if tiled.shape[-1] == 1 else tiled)
    encoded = [("png", _encoded(picture, "PNG", optimize=True))]
    if not small and picture.mode in ("L", "RGB"):
        encoded.append(("jpeg", _encoded(picture, "JPEG", quality=_JPEG_QUALITY, optimize=True)))
    kind, data = min(encoded, key=lambda pair: len(pair[1]))
    scale = max(1, _PANEL // picture.width) if small else 1
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, picture.width * scale, picture.height * scale, pixelated=small)


def _shrunk(image: np.ndarray) -> np.ndarray:
    whole = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    factor = SHRUNK_TO / max(whole.size)
    array = np.asarray(whole.resize([max(1, round(side * factor)) for side in whole.size], Image.Resampling.BOX))
    return array[..., None] if array.ndim == 2 else array


def _encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()
