"""One page of several tables, from folders that other commands left: nothing is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from qdiff.io.images import save_png

TABLES = Path(__file__).parents[2] / "configs" / "tables"
DDIM, VQ = TABLES / "leaderboard-ddim.yaml", TABLES / "leaderboard-vq.yaml"
ROWS = [
    {"label": "float", "method": "float", "weight_bits": 32, "act_bits": 32, "bytes": 4e6},
    {
        "label": "GRIP W4A8", "method": "grip", "weight_bits": 4, "act_bits": 8, "bytes": 1e6, "noise_mse": 3e-4,
        "noise_mse_std": 1e-5, "calibration_cpu_s": 40.0, "seeds": 2, "command": "python x.py", "flags": [],
    },
]  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """The folder of one table of two; GRIP's first seed has no images."""
    folder = tmp_path / "runs" / DDIM.stem
    results = {"title": "Digits", "protocol": {"seed": "1234"}, "notes": ["Rows not yet run: many."], "rows": ROWS}
    for number, name in enumerate(("float", "grip-w4a8-seed-7", "grip-w4a8-seed-99")):
        for i in range(2):
            save_png(np.full((8, 8, 1), 90 * number, dtype=np.uint8), folder / name / "img" / f"{i:05d}.png")
    (folder / "table.json").write_text(json.dumps(results))
    return folder.parent


@pytest.mark.slow
def test_what_is_there_is_shown_and_the_rest_named(runs, call, tmp_path):
    page = tmp_path / "all.html"
    outcome = call("tables_page", DDIM, VQ, "--out", page, "--runs", runs, "--title", "Leaderboard")
    assert outcome.code == 0, outcome.err
    assert "Not yet run: Leaderboard, Digits, VQ latents" in outcome.out
    text = page.read_text(encoding="utf-8")
    assert "<title>Leaderboard</title>" in text and "Rows not yet run: many." in text
    assert f"Not yet run: python scripts/reproduce.py {VQ}" in text
    assert text.count("First images: ") == 2 and "GRIP W4A8: ε error 3.00e-04 ± 1.00e-05, 40.0 CPU s" in text
    assert text.index("First images: ") < text.index("<table>") < text.index("CPU s<") < text.index("<dl>")
    again = tmp_path / "again.html"
    call("tables_page", DDIM, VQ, "--out", again, "--runs", runs, "--title", "Leaderboard")
    assert again.read_bytes() == page.read_bytes()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", json.dumps({"title": "T", "protocol": {}, "notes": [], "rows": [{}]})]
)
def test_damaged_results_are_one_sentence(text, runs, call, tmp_path):
    (runs / DDIM.stem / "table.json").write_text(text)
    line = call("tables_page", DDIM, "--out", tmp_path / "all.html", "--runs", runs).error_line()
    assert "table.json holds no results of a table" in line and "scripts/reproduce.py" in line
    assert not (tmp_path / "all.html").exists()


def test_other_bad_input_is_one_sentence(call, tmp_path):
    line = call("tables_page", tmp_path / "none.yaml", "--out", tmp_path / "all.html").error_line()
    assert "none.yaml" in line
    (tmp_path / "folder").mkdir()
    assert call("tables_page", DDIM, "--out", tmp_path / "folder").code == 2
