"""The picture of runs beside each other."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qdiff.io.images import save_png
from qdiff.report.comparison import comparison_picture


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
