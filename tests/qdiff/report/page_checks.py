"""Rows of a table, the page that is written of them, and what is read from it."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from qdiff.io.images import save_png
from qdiff.report.page import TableResults, write_page

VOID = {"meta", "link", "img", "path", "use", "br"}


def row(label: str, method: str, weights: int, acts: int, **numbers) -> dict:
    return {
        "label": label,
        "method": method,
        "weight_bits": weights,
        "act_bits": acts,
        "split": False,
        "images": 1000,
        "flags": [],
        "command": f"python sample.py --label '{label}'",
        **numbers,
    }


def results() -> list[dict]:
    published = {"fid": 4.22, "isc": 9.1}
    return [
        row("float", "float", 32, 32, fid=4.5, isc=9.12, isc_std=0.11, bytes=143e6, published=published),
        row("linear W8A8", "linear", 8, 8, fid=6.25, isc=8.5, isc_std=0.2, psnr=25.0, bytes=36.1e6),
        row("Q-Diffusion W8A8", "qdiff", 8, 8, fid=4.51, isc=9.1, psnr=33.5, bytes=36.2e6, published={"fid": 4.3}),
        row("Q-Diffusion W4A8", "qdiff", 4, 8, fid=4.93, isc=9.02, psnr=None, bytes=18.4e6, split=True),
    ]


class Page(HTMLParser):
    """Elements in order: (tag, attributes, text within)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[list] = []
        self._open: list[list] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag, "an element is closed that is not the last one opened"

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag: str) -> list[tuple[dict, str]]:
        return [(attributes, text.strip()) for name, attributes, text in self.elements if name == tag]

    def table(self) -> list[list[tuple[dict, str]]]:
        """Cells of the table's rows, the header's first."""
        lines: list[list] = []
        for tag, attributes, text in self.elements:
            if tag == "tr":
                lines.append([])
            elif tag in ("th", "td"):
                lines[-1].append((attributes, text.strip()))
        return lines


def image_folders(tmp_path, rows, size=8, count=5, channels=3):
    folders = {}
    for number, entry in enumerate(rows):
        folders[entry["label"]] = tmp_path / f"row{number}"
        for i in range(count):
            value = 10 * i + 5 * number
            save_png(np.full((size, size, channels), value, dtype=np.uint8), tmp_path / f"row{number}" / f"{i:05d}.png")
    return folders


def written(tmp_path, rows, folders=None, **options) -> str:
    options = {"title": "A table", "protocol": [("sampler", "DDIM, 100 steps")], **options}
    write_page(tmp_path / "table.html", TableResults(rows=rows, folders=folders or {}, **options))
    return (tmp_path / "table.html").read_text(encoding="utf-8")


def strips(page: Page) -> list[dict]:
    return [a for a, _ in page.all("img") if a["alt"].startswith("First images: ")]


def panels(page: Page) -> list[dict]:
    return [a for a, _ in page.all("img") if a["alt"].startswith("Images: ")]


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


def assert_needs_nothing_from_outside(page: Page, text: str) -> None:
    for _tag, attributes, _ in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert all(found.startswith(("data:", "#")) for found in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "http:" not in text and "https:" not in text and "@import" not in text
    policy = next(a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
