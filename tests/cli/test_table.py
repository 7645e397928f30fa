"""Measuring the rows of a table: real metrics of digits that stand in for samples."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from threadpoolctl import threadpool_limits

from ddim.datasets.digits import load_digit_images
from qdiff.cli import table as module
from qdiff.cli.table import TableRun
from qdiff.evaluation import conditions, extractors, metrics
from qdiff.images import save_png

COUNT = 20
DIGITS, LABELS = load_digit_images(32)
ASKED = [int(label) for label in LABELS[:COUNT]]


@pytest.fixture(autouse=True)
def one_blas_thread():
    """SciPy's BLAS does not heed OMP_NUM_THREADS set after its import."""
    with threadpool_limits(1):
        yield


@pytest.fixture
def latent(tmp_path, monkeypatch):
    """``latent(row=labels, ...)`` runs a table of a latent config and returns its rows, as table.json has them.

    A row's images are real digits; its run.json holds these labels, or no such key for "absent".
    """
    config = tmp_path / "models" / "ldm" / "digits" / "config.yaml"
    config.parent.mkdir(parents=True)
    pretrained = {"extractor": "digits-classifier", "reference": "models/digits32_reference.npz"}
    config.write_text(yaml.safe_dump({"model": {"target": "ldm.x", "params": {}}, "pretrained": pretrained}))
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")

    def run(**labels: list | str | None) -> dict[str, dict]:
        def sample(command: list[str]) -> None:
            folder = Path(command[command.index("-l") + 1])
            if not (folder / "img").is_dir():
                for i in range(COUNT):
                    save_png(np.repeat(DIGITS[i, :, :, None], 3, axis=2), folder / "img" / f"{i:05d}.png")
            manifest = {
                "config": {"seed": 0, "sampler": "plms"},
                "command": "python " + " ".join(command),
                "num_images": COUNT,
                "status": "finished",
                "packages": {},
                "machine": {"cpus": 2},
                "files": {"float weights": {"path": str(weights)}},
                "seconds": {"sampling": 1.0},
            }
            if labels[folder.name] != "absent":
                manifest["labels"] = labels[folder.name]
            (folder / "run.json").write_text(json.dumps(manifest))

        rows = [{"label": label} for label in labels]
        spec = {"title": "T", "config": str(config), "script": "s.py", "options": "--n 1", "rows": rows}
        (tmp_path / "t.yaml").write_text(yaml.safe_dump(spec))
        monkeypatch.setattr(module, "_call", sample)
        TableRun(str(tmp_path / "t.yaml"), str(tmp_path / "out"), None, None, None).run()
        return {row["label"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())["rows"]}

    run.out, run.config = tmp_path / "out", config
    return run


def test_conditional_rows_say_how_many_images_are_what_was_asked_for(latent):
    half = [digit if i % 2 else (digit + 1) % 10 for i, digit in enumerate(ASKED)]
    rows = latent(right=ASKED, half=half, null=None, absent="absent")
    assert rows["right"]["asked_share"] == 1.0 and rows["half"]["asked_share"] == 0.5
    assert "asked_share" not in rows["null"] and "asked_share" not in rows["absent"]
    lines = [line for line in (latent.out / "table.md").read_text().splitlines() if line.startswith("|")]
    assert "asked ↑" in lines[0]
    assert "| 50.0 % |" in lines[3] and "%" not in lines[4]
    assert "Asked: " in (latent.out / "table.md").read_text()


def test_unconditional_tables_have_no_such_column(latent):
    latent(first=None, second="absent")
    assert "asked" not in (latent.out / "table.md").read_text().lower()


def test_reference_is_the_one_of_the_latent_config(latent):
    fid = latent(row=None)["row"]["fid"]
    assert "models/digits32_reference.npz" in (latent.out / "table.md").read_text()
    # Another reference in the config gives other numbers, in spite of the cached ones.
    latent.config.write_text(latent.config.read_text().replace("digits32_", "digits_"))
    assert abs(latent(row=None)["row"]["fid"] - fid) > 1e-3


def test_asked_share_is_cached_and_made_up_for_where_it_lacks(latent, monkeypatch):
    calls = []

    def counted(name, function):
        return lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs)

    monkeypatch.setattr(conditions, "asked_share", counted("asked", conditions.asked_share))
    monkeypatch.setattr(metrics, "compute_metrics", counted("metrics", metrics.compute_metrics))
    first = latent(row=ASKED)
    assert calls == ["metrics", "asked"]
    assert latent(row=ASKED) == first and calls == ["metrics", "asked"]

    cache = latent.out / "row" / "metrics.json"
    kept = json.loads(cache.read_text())
    assert kept.pop("asked_share") == 1.0
    cache.write_text(json.dumps(kept))
    assert latent(row=ASKED) == first and calls == ["metrics", "asked", "asked"]
    assert json.loads(cache.read_text())["asked_share"] == 1.0

    # Images newer than the cache: both anew.
    image = latent.out / "row" / "img" / "00000.png"
    image.unlink()
    save_png(np.zeros((32, 32, 3), np.uint8), image)
    os.utime(image.parent, (cache.stat().st_mtime + 1,) * 2)
    assert latent(row=ASKED)["row"]["asked_share"] == pytest.approx(1 - 1 / COUNT, abs=1e-9)
    assert calls[-2:] == ["metrics", "asked"]


def test_extractor_without_class_names_measures_the_rest(latent, monkeypatch):
    spec = extractors.EXTRACTORS["digits-classifier"]
    nameless = extractors.ExtractorSpec(**{**vars(spec), "classes": None})
    monkeypatch.setitem(extractors.EXTRACTORS, "digits-classifier", nameless)
    row = latent(row=ASKED)["row"]
    assert "asked_share" not in row and row["isc"] > 1
