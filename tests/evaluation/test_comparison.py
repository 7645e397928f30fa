"""The markdown table and the picture of runs beside each other."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qdiff.evaluation.comparison import comparison_picture, markdown
from qdiff.images import save_png

ROW = {
    "label": "W4A8",
    "fid": 3.14159,
    "isc": 9.05,
    "isc_std": 0.123,
    "kid": 0.00056,
    "noise_mse": 1.234e-3,
    "bytes": 17_890_000,
    "calibration_s": 61.6,
    "sampling_s": 7.4,
}
CELLS = ["W4A8", "3.14", "9.05 ± 0.12", "0.0006", "1.23e-03", "17.89 MB", "62 s", "7 s"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_has_a_header_and_a_line_a_row():
    lines = markdown([ROW, ROW]).splitlines()
    assert [len(cells(line)) for line in lines] == [len(CELLS)] * 4
    assert cells(lines[0])[1] == "FID ↓" and set(cells(lines[1])) == {"---"}
    assert cells(lines[2]) == cells(lines[3]) == CELLS
    assert markdown([ROW], header=False) == lines[2]


def test_float_rows_have_neither_error_nor_calibration():
    shown = cells(markdown([{**ROW, "noise_mse": None, "calibration_s": 0.0}], header=False))
    assert shown[4] == "–" and shown[6] == "–"


def test_asked_share_has_a_column_if_a_row_has_one():
    lines = markdown([ROW, {**ROW, "asked_share": 0.98765}, {**ROW, "asked_share": 0.0}]).splitlines()
    shown = [cells(line)[4] for line in lines]
    assert shown == ["asked ↑", "---", "–", "98.8 %", "0.0 %"]
    assert [cells(line)[:4] + cells(line)[5:] for line in lines[2:]] == [CELLS] * 3
    assert "asked" not in markdown([ROW, {**ROW, "asked_share": None}])


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_shows_every_run(channels, tmp_path):
    for label, value in (("dark", 0), ("light", 200)):
        for i in range(30):
            save_png(np.full((8, 8, channels), value, dtype=np.uint8), tmp_path / label / f"{i:05d}.png")
    target = tmp_path / "picture"
    comparison_picture([(name, tmp_path / name) for name in ("dark", "light")], target)
    with Image.open(target) as picture:
        assert picture.format == "PNG"
        grey = np.asarray(picture.convert("L"))
    left, right = np.split(grey, [grey.shape[1] // 2], axis=1)
    assert (left == 0).mean() > 0.3 > (right == 0).mean()  # the dark run is left, under its label
    assert (right == 200).mean() > 0.3 > (left == 200).mean()
