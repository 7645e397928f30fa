"""Plots against the bits of activations: which lines there are, what tells them apart, and when there is a plot."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from qdiff.evaluation.registry import metric_columns
from qdiff.report.activation_plots import activation_picture, activation_plots, activation_series, pictured
from qdiff.report.metric_axes import method_name
from qdiff.report.page import TableResults, write_page
from qdiff.report.plots import series_of

WIDTHS = (8, 6, 4, 3, 2)
FID = next(column for column in metric_columns() if column.key == "fid")


def row(label: str, method: str, weights: int, acts: int, **others) -> dict:
    return {"label": label, "method": method, "weight_bits": weights, "act_bits": acts, "split": False, **others}


def grid(weights=(8, 4), scales=("tensor", "sample", "channel"), widths=WIDTHS, metric="fid") -> list[dict]:
    """Rows as of modiff-digits.yaml; modulation makes a tenth of the loss."""
    rows = [row("float", "float", 32, 32, **{metric: 0.3})]
    rows += [row(f"W{w}A32", "qdiff", w, 32, **{metric: 0.3 + 0.4 / w}) for w in weights]
    for modulate in (False, True):
        for w in weights:
            for a in widths:
                for n, scale in enumerate(scales):
                    value = 0.3 + (10 - n - w / 8) * 2.0**-a * (1 if modulate else 10)
                    label = f"W{w}A{a} {scale}{' MoDiff' if modulate else ''}"
                    numbers = {metric: value, "modulate": modulate, "ranges": scale}
                    rows.append(row(label, "modiff" if modulate else "qdiff", w, a, **numbers))
    return rows


def titles(svg: str) -> list[str]:
    return re.findall("<title>(.*?)</title>", svg)


@pytest.mark.slow
def test_a_line_for_every_choice_beside_the_width():
    rows = grid()
    series = activation_series(rows)
    assert [s.name for s in series[:4]] == [
        *("W8 Q-Diffusion, tensor", "W8 MoDiff, tensor", "W8 Q-Diffusion, sample", "W8 MoDiff, sample")
    ]
    assert len(series) == len({s.name for s in series}) == 12
    for s in series:
        assert [rows[i]["act_bits"] for i in s.rows] == list(WIDTHS)
    shown = titles(activation_plots(rows)["fid"])
    assert all(shown.count(s.name) == 1 for s in series)
    assert all(sum(t.startswith(f"{r['label']}: FID ") for t in shown) == 1 for r in rows)  # float and W8A32 too


def test_what_tells_lines_apart():
    """Dashes tell the width of weights; colour and marker the rest."""
    series = {s.name: s for s in activation_series(grid())}
    for name, s in series.items():
        same = [other for other in series.values() if other.dashes == s.dashes]
        assert {other.name[:2] for other in same} == {name[:2]}
    for w in (8, 4):
        assert len({s.colour for name, s in series.items() if name.startswith(f"W{w}")}) == 6
    for scale in ("tensor", "sample", "channel"):
        assert series[f"W8 MoDiff, {scale}"].colour == series[f"W4 MoDiff, {scale}"].colour
        assert len({s.marker for name, s in series.items() if name.endswith(scale)}) == 1


def test_colours_do_not_depend_on_other_rows():
    alone = activation_series(grid(weights=(4,), scales=("sample",)))
    beside = {s.name: s for s in activation_series(grid())}
    # Alone, there is no other kind of range: only that it is no tensor's is worth a word.
    assert [s.name for s in alone] == ["W4 Q-Diffusion, sample", "W4 MoDiff, sample"]
    assert [s.colour for s in alone] == [beside[s.name].colour for s in alone]
    assert [s.name for s in activation_series(grid(weights=(4,), scales=("tensor",)))] == [
        "W4 Q-Diffusion",
        "W4 MoDiff",
    ]


def test_methods_splits_and_ablations_are_lines_of_their_own():
    rows = [
        row("a", "linear", 4, 8),
        row("b", "linear+modiff", 4, 8, modulate=True),
        row("c", "eda-dm+modiff", 4, 8, modulate=True),
        row("d", "modiff", 4, 8, modulate=True),
        row("e", "modiff", 4, 8, modulate=True, split=True),
        row("f", "modiff", 4, 8, modulate=True, ablation="no-compensation"),
        row("g", "qdiff", 4, 32),
    ]
    series = {s.name: s for s in activation_series(rows)}
    assert set(series) == {
        *("W4 linear", "W4 linear + MoDiff", "W4 EDA-DM + MoDiff", "W4 MoDiff", "W4 MoDiff, split"),
        "W4 MoDiff, no-compensation",
    }
    looks = {(s.colour, s.marker, str(s.dashes)) for s in series.values()}
    assert len(looks) == len(series)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("float", "float"),
        ("linear", "linear"),
        ("qdiff", "Q-Diffusion"),
        ("eda-dm", "EDA-DM"),
        ("ptq4dm", "PTQ4DM"),
        ("modiff", "MoDiff"),
        ("linear+modiff", "linear + MoDiff"),
        ("eda-dm+modiff", "EDA-DM + MoDiff"),
        ("new", "new"),
    ],
)
def test_methods_have_their_papers_names(method, name):
    assert method_name({"method": method}) == name
    if method != "float":
        assert [s.name for s in series_of([row("a", method, 4, 8)])] == [name]


def test_methods_of_the_commands_have_styles_of_their_own():
    methods = ("linear", "qdiff", "eda-dm", "ptq4dm", "modiff", "linear+modiff", "eda-dm+modiff", "ptq4dm+modiff")
    series = series_of([row(m, m, 4, 8) for m in methods])
    assert len({(s.colour, s.marker) for s in series}) == len(methods)
    # EDA-DM's does not depend on who else is there.
    assert series_of([row("a", "new", 4, 8), row("b", "eda-dm", 4, 8)])[1].colour == series[2].colour


@pytest.mark.parametrize(("widths", "there"), [((8, 4), False), ((8, 6, 4), True)])
def test_two_widths_are_no_plot(widths, there):
    rows = grid(widths=widths)  # W8A32 and W4A32 are no third width
    assert (set(activation_plots(rows)) == {"fid"}) is there
    assert (pictured(rows) is not None) is there


def test_only_measured_rows_count():
    rows = grid(weights=(4,), scales=("tensor",))
    for r in rows:
        if r["act_bits"] < 6:
            r["fid"] = None if r["act_bits"] < 4 else float("inf")
    assert activation_plots(rows) == {}


@pytest.mark.slow
def test_the_picture_shows_fid_or_the_first_metric():
    both = [{**r, "psnr": 30.0} for r in grid()]
    assert pictured(both).key == "fid" and set(activation_plots(both)) == {"fid", "psnr"}
    assert pictured(grid(metric="psnr")).key == "psnr"


@pytest.mark.slow
def test_weights_alone_and_float_are_lines_from_side_to_side():
    rows = [*grid(weights=(4,)), row("linear W4A32", "linear", 4, 32, fid=9.0)]
    shown = titles(activation_plots(rows)["fid"])
    assert "float: FID 0.30" in shown and "W4A32: FID 0.40" in shown
    assert not any(t.startswith("linear W4A32") for t in shown)  # the better one stands for what the weights allow
    better = [{**r, "psnr": 1 / r["fid"]} for r in rows]  # higher is better
    assert any(t.startswith("W4A32: PSNR") for t in titles(activation_plots(better)["psnr"]))


def test_published_numbers_are_hollow_points():
    rows = grid(weights=(4,), scales=("tensor",))
    rows[-1]["published"] = {"fid": 4.98}
    shown = titles(activation_plots(rows)["fid"])
    assert f"{rows[-1]['label']}: FID 4.98 as published" in shown


@pytest.mark.slow
def test_the_page_shows_the_plot_below_the_others(tmp_path):
    for rows, there in ((grid(), True), (grid(widths=(8, 4)), False)):
        write_page(tmp_path / "table.html", TableResults("T", rows=rows))
        text = (tmp_path / "table.html").read_text(encoding="utf-8")
        assert ('aria-label="FID against activation bits"' in text) is there
        assert ('<div class="wide">' in text) is there
        ids = re.findall(r'\bid="([^"]*)"', text)
        assert len(ids) == len(set(ids))


@pytest.mark.slow
def test_the_picture_is_the_same_for_equal_rows(tmp_path):
    for name in ("a.png", "b.png"):
        activation_picture(FID, grid(), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    # Three hues with modulation: Okabe and Ito's blue, vermillion and green.
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):
        assert (pixels == colour).all(-1).sum() > 200
