"""Pages of rows with several seeds: quality against time, and several tables on one page."""

from __future__ import annotations

import re

import pytest
from page_checks import Page, assert_needs_nothing_from_outside, image_folders, results, row, strips, written

from qdiff.report.page import TableResults, write_tables_page
from qdiff.report.plots import metric_plots, shape_legend


def timed(label: str, method: str, bits: tuple[int, int], error: float, seconds: float, **numbers) -> dict:
    return row(label, method, *bits, noise_mse=error, calibration_cpu_s=seconds, bytes=1e6, **numbers)


def seeds(**spreads: float) -> dict:
    return {"seeds": 3, **{f"{key}_std": value for key, value in spreads.items()}}


TIMED = [
    row("float", "float", 32, 32, bytes=4e6),
    timed("linear W4A8", "linear", (4, 8), 5e-3, 1.0, **seeds(noise_mse=1e-4, calibration_cpu_s=0.2)),
    timed("GRIP W4A8", "grip", (4, 8), 3e-4, 40.0, **seeds(noise_mse=1e-4, calibration_cpu_s=5.0)),
    timed("EDA-DM W4A8", "eda-dm", (4, 8), 3.5e-4, 400.0, **seeds(noise_mse=2e-4, calibration_cpu_s=5.0)),
    timed("EDA-DM W8A8", "eda-dm", (8, 8), 2e-4, 400.0, **seeds(noise_mse=1e-5, calibration_cpu_s=5.0)),
]


@pytest.mark.slow
def test_quality_against_time_has_a_point_for_each_row_with_both_numbers():
    (plot,) = metric_plots([*TIMED, timed("loaded W4A8", "qdiff", (4, 8), 1e-3, None)])
    titles = re.findall("<title>(.*?)</title>", plot.against_time)
    shown = ["linear W4A8", "GRIP W4A8", "EDA-DM W4A8", "EDA-DM W8A8"]
    assert [title.split(":")[0] for title in titles if "CPU s" in title] == shown
    assert "GRIP W4A8: ε error 3.00e-04 ± 1.00e-04, 40.0 CPU s" in titles
    assert "loaded" not in plot.against_time and "loaded W4A8: ε error 1.00e-03, 1.00 MB" in plot.against_size
    assert metric_plots(results())[0].against_time is None


@pytest.mark.slow
def test_a_shape_is_a_width_and_a_colour_a_method():
    def marker(label: str) -> tuple[bool, list[str]]:
        """Whether it is round, and its colour; black is SVG's own colour, and not written."""
        drawn = plot.against_time.split(f"<title>{label}:")[1].split("</g>")[0]
        used = re.search(r'<use href="#([^"]*)"', drawn)[1]
        outline = plot.against_time.split(f'<path id="{used}" d="')[1].split('"')[0]
        return "C" in outline, re.findall(r"fill: (#\w+)", drawn)

    (plot,) = metric_plots(TIMED)
    assert marker("GRIP W4A8") == (False, [])
    assert (marker("EDA-DM W4A8"), marker("EDA-DM W8A8")) == ((False, ["#009e73"]), (True, ["#009e73"]))
    assert [name for name, _ in shape_legend(TIMED)] == ["W8A8", "W4A8"]


@pytest.mark.slow
def test_numbers_of_seeds_compete_within_their_widths_and_may_be_equal(tmp_path):
    header, *lines = Page(written(tmp_path, TIMED)).table()
    at = [shown for _, shown in header].index("ε error ↓")
    classes, texts = zip(*((line[at][0].get("class"), line[at][1]) for line in lines), strict=True)
    assert classes == (None, None, "best", None, None)  # a row alone at its widths is not compared
    assert [text.endswith(" =") for text in texts] == [False, False, False, True, False]


def tables_page(tmp_path, *tables: TableResults) -> str:
    write_tables_page(tmp_path / "all.html", "All", tables)
    return (tmp_path / "all.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_page_of_several_tables(tmp_path):
    one = TableResults("One", [("seed", "1")], TIMED, image_folders(tmp_path / "one", TIMED), ["A note."])
    two = TableResults("Two", [("seed", "2")], TIMED[:3], image_folders(tmp_path / "two", TIMED[:3]))
    text = tables_page(tmp_path, one, two, TableResults("Three", notes=["Not yet run: a command"]))
    page = Page(text)
    assert_needs_nothing_from_outside(page, text)
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [shown for _, shown in page.all("h2")] == ["One", "Two", "Three"]
    assert len(page.all("table")) == 2 and len(strips(page)) == 5 + 3
    assert text.count("ε error against time") == text.count("ε error against size") == 2
    assert [shown for _, shown in page.all("dd")] == ["1", "2"]
    assert "Not yet run: a command" in [shown for _, shown in page.all("p")]
    first = text[text.index(">One</h2>") : text.index(">Two</h2>")]
    places = [first.index(part) for part in ('class="strips"', "<table>", "against time", "against size", "<dl>")]
    assert places == sorted(places)


@pytest.mark.slow
def test_colours_and_shapes_mean_the_same_in_every_table(tmp_path):
    """A method without a colour of its own takes the one that it has among all rows."""
    new = [timed(f"{m} W4A8", m, (4, 8), 1e-3, 9.0) for m in ("new", "newer")]
    text = tables_page(tmp_path, TableResults("A", rows=new), TableResults("B", rows=new[1:]))
    found = re.findall(r"<title>newer W4A8: .*?fill: (#\w+)", text, re.DOTALL)
    assert len(found) == 4 and len(set(found)) == 1
    assert re.findall(r"<title>new W4A8: .*?fill: (#\w+)", text, re.DOTALL)[0] != found[0]


def test_tables_without_results_make_a_page(tmp_path):
    page = Page(tables_page(tmp_path, TableResults("Three", notes=["Not yet run: a command"])))
    assert page.all("table") == [] and page.all("ul") == []
