"""A new metric is a function and a row: evaluate.py, tables and plots then know it."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
from digit_runs import COUNT, QUANTIZED, write_run

from qdiff.cli.evaluate import Evaluation
from qdiff.cli.evaluate import table as shown
from qdiff.errors import UserError
from qdiff.evaluation.column import HIGHER, Column
from qdiff.evaluation.registry import METRICS, Metric
from qdiff.evaluation.subject import Subject
from qdiff.report.plots import metric_plots

OPTIONS = dict.fromkeys(("against", "lpips_weights", "prompts", "extractor", "extractor_weights", "protocol", "cache"))
ROWS = [{"label": "float"}, {"label": "W4", "options": QUANTIZED}]


def brightness(subject: Subject) -> dict[str, float]:
    """Mean of all pixels, 0 to 255."""
    return {"brightness": float(np.mean([batch.double().mean() for batch in subject.images.batches(1)]))}


@pytest.fixture
def planted(monkeypatch):
    row = Metric("brightness", brightness, (Column("brightness", "brightness", HIGHER, "{:.3f}".format),))
    monkeypatch.setitem(METRICS, "brightness", row)


def evaluate(*paths: object, metrics: str | None) -> dict:
    args = Namespace(paths=[*map(str, paths)], metrics=metrics, clip=False, no_cache=True, batch_size=None, **OPTIONS)
    args.lpips_net, args.device = "alex", "cpu"
    return Evaluation(args).run()


def test_evaluate_measures_it(planted, tmp_path, digits):
    write_run(tmp_path / "run", digits[0])
    expected = float(digits[0].mean())
    alone = evaluate(tmp_path / "run", metrics="brightness")  # it needs no reference, and no feature network
    assert alone["metrics"] == {"brightness": pytest.approx(expected)} and "protocol" not in alone
    assert f"| brightness ↑ | {expected:.3f} |" in shown(alone)
    beside = evaluate("digits32", tmp_path / "run", metrics="fid,brightness")
    assert {"fid", "brightness"} <= beside["metrics"].keys() and "isc" not in beside["metrics"]
    assert "brightness" in evaluate("digits32", tmp_path / "run", metrics=None)["metrics"]


@pytest.mark.slow
def test_tables_and_plots_show_it(planted, table, digits):
    table.changed = {"w4": 10}
    rows = table.run(ROWS, metrics=["fid", "brightness"])
    brighter = np.clip(digits[0].astype(int) + 10, 0, 255)
    assert rows["float"]["brightness"] == pytest.approx(digits[0].mean())
    assert rows["W4"]["brightness"] == pytest.approx(brighter.mean())
    assert table.cells("W4")["brightness ↑"] == f"{brighter.mean():.3f}"
    plots = metric_plots([rows["float"], {**rows["W4"], "method": "linear", "weight_bits": 4}])
    assert "brightness" in [plot.column.key for plot in plots]
    # A paper's number of it is a published number like any other.
    with pytest.raises(UserError, match=r"brightness .* misses the published"):
        table.run([{"label": "float", "published": {"brightness": 1.0}}], metrics=["brightness"])


def test_it_is_told_how_many_images_and_what_else_it_needs(planted, monkeypatch, table):
    picky = Metric("brightness", brightness, METRICS["brightness"].columns, least_images=COUNT + 1)
    monkeypatch.setitem(METRICS, "brightness", picky)
    assert "brightness" not in table.run(ROWS, metrics=["fid", "brightness"])["W4"]
    needy = Metric("brightness", brightness, METRICS["brightness"].columns, inputs=("prompts",))
    monkeypatch.setitem(METRICS, "brightness", needy)
    with pytest.raises(UserError, match=r"has no prompts in its run\.json, which brightness needs"):
        table.run(ROWS, metrics=["fid", "brightness"])


def test_without_the_row_its_name_is_an_error(table, tmp_path, digits):
    write_run(tmp_path / "run", digits[0])
    with pytest.raises(UserError, match="--metrics has no 'brightness'; choose from fid, sfid, isc, kid, prc"):
        evaluate(tmp_path / "run", metrics="brightness")
    with pytest.raises(UserError, match="no 'brightness'; choose from fid, sfid, isc, kid, prc, clip, fidelity"):
        table.file(ROWS, metrics=["fid", "brightness"])
