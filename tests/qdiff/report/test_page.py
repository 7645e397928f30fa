"""The web page of results: self-contained, sortable, and showing the numbers that the rows have."""

from __future__ import annotations

import math
import re

import pytest
from page_checks import (
    Page,
    assert_needs_nothing_from_outside,
    decoded,
    image_folders,
    panels,
    results,
    row,
    strips,
    written,
)

from qdiff.evaluation.column import NOTHING
from qdiff.report import page as page_module
from qdiff.report.columns import columns_of
from qdiff.report.page_pictures import AMPLIFIED, SHRUNK_TO, STRIP_SHRUNK_TO
from qdiff.report.plots import legend, metric_plots, series_of

QUANTIZED = ("linear W8A8", "Q-Diffusion W8A8", "Q-Diffusion W4A8")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    return written(folder, results(), image_folders(folder, results()), notes=["A note."])


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_the_page_needs_nothing_from_outside(page, text):
    assert_needs_nothing_from_outside(page, text)


def test_ids_are_unique_and_links_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for _, attributes, _ in page.elements if attributes.get("href", "").startswith("#")]
    assert links and {link[1:] for link in links} <= set(ids)


def test_cells_hold_the_columns_texts_and_the_numbers_to_sort_by(page):
    rows, columns = results(), columns_of(results())
    header, *lines = page.table()
    assert [text for _, text in header] == ["row", "bits", *(c.heading for c in columns)]
    for entry, line in zip(rows, lines, strict=True):
        assert [text for _, text in line[2:]] == [c.text(entry) for c in columns]
        assert line[0][1] == entry["label"]
        for column, (attributes, shown) in zip(columns, line[2:], strict=True):
            if shown == NOTHING:
                assert "data-value" not in attributes
            else:
                assert float(attributes["data-value"]) == column.value(entry)


def test_headers_sort_by_a_button_and_say_so(page, text):
    header = page.table()[0]
    assert all(attributes["aria-sort"] == "none" and attributes["scope"] == "col" for attributes, _ in header)
    assert text.count('<button type="button">FID ↓</button>') == 1
    bits = [float(line[1][0]["data-value"]) for line in page.table()[1:]]
    assert sorted(bits, reverse=True) == bits and len(set(bits)) == 3


def test_the_best_quantized_number_is_marked_and_published_ones_differ(page):
    columns = [c.heading for c in columns_of(results())]
    lines = page.table()[1:]

    def classes(heading: str) -> list[str | None]:
        return [line[2 + columns.index(heading)][0].get("class") for line in lines]

    assert classes("FID ↓") == [None, None, "best", None]  # float is better, but no rival
    assert classes("IS ↑") == [None, None, "best", None]
    assert classes("FID (paper) ↓") == ["published"] * 4


def test_equal_numbers_have_no_winner(tmp_path):
    rows = [row(label, "linear", 8, 8, fid=3.0, mean_weight_bits=bits) for label, bits in (("a", 3.7), ("b", 4.0))]
    assert "best" not in [a.get("class") for line in Page(written(tmp_path, rows)).table() for a, _ in line]


def test_labels_and_sentences_are_escaped(tmp_path):
    label = "<b>W4</b> \"A8\" & 'x'"
    rows = [row(label, "<i>new</i>", 4, 8, fid=1.0, bytes=1e6, flags=["<script>alert(1)</script>"])]
    text = written(tmp_path, rows, title="<u>title", protocol=[("<p>", "</dl>")], notes=["<hr>"])
    for bad in ("<b>", "<i>", "<u>", "<hr>", "<script>alert"):
        assert bad not in text
    page = Page(text)
    assert page.table()[1][0][0]["data-value"] == label
    assert page.all("h1")[0][1] == "<u>title" and page.all("dd")[0][1] == "</dl>"
    assert f"{label}: FID 1.00" in [shown for _, shown in page.all("title")]


@pytest.mark.slow
def test_flags_are_shown_on_top_and_in_their_row(tmp_path):
    rows = results()
    rows[0]["flags"] = ["FID 4.5 misses the published 4.22."]
    text = written(tmp_path, rows)
    page = Page(text)
    notices = next(shown for attributes, shown in page.all("section") if attributes.get("class") == "notices")
    assert "float: FID 4.5 misses the published 4.22." in notices
    assert page.table()[1][-1][1] == "FID 4.5 misses the published 4.22."
    assert [a.get("class") for a, _ in page.all("tr")] == [None, "flagged", None, None, None]


def test_without_flags_there_is_no_notice(page, text):
    assert 'class="notices"' not in text and "remarks" not in [shown for _, shown in page.table()[0]]


def test_protocol_notes_and_commands_are_there(page):
    assert [shown for _, shown in page.all("dt")] == ["sampler"]
    assert "A note." in [shown for _, shown in page.all("p")]
    assert [shown for _, shown in page.all("code")] == [entry["command"] for entry in results()]


@pytest.mark.slow
def test_counts_of_images_have_a_column_where_they_differ(tmp_path, page):
    assert "images" not in [shown for _, shown in page.table()[0]]
    rows = results()
    rows[1]["images"] = 50_000
    lines = Page(written(tmp_path, rows)).table()
    assert lines[0][2][1] == "images" and lines[2][2] == ({"data-value": "50000"}, "50,000")


@pytest.mark.parametrize(
    "only",
    [
        row("float", "float", 32, 32, fid=4.5, bytes=1e6),
        row("W4A8", "qdiff", 4, 8, fid=4.5, bytes=1e6),
        row("nothing measured", "qdiff", 4, 8),
        row("odd", "qdiff", 4, 8, fid=math.nan, psnr=math.inf, isc=0.0, bytes=1e6),
    ],
    ids=lambda entry: entry["label"],
)
def test_one_row_is_enough(only, tmp_path):
    page = Page(written(tmp_path, [only], image_folders(tmp_path, [only]), protocol=[]))
    assert len(page.table()) == 2
    assert bool(metric_plots([only])) == (only["label"] in ("W4A8", "odd"))


def test_numbers_that_are_none_sort_last_and_infinite_ones_as_such(tmp_path):
    rows = [row("a", "qdiff", 8, 8, fid=math.nan, psnr=math.inf), row("b", "qdiff", 4, 8, fid=1.0, psnr=30.0)]
    _, first, second = Page(written(tmp_path, rows)).table()
    assert "data-value" not in first[2][0] and second[2][0]["data-value"] == "1.0"
    assert first[3][0]["data-value"] == "Infinity" and first[3][0]["class"] == "best"


@pytest.mark.slow
def test_every_plot_has_each_method_once():
    rows = results()
    names = [series.name for series in series_of(rows)]
    assert names == ["linear", "Q-Diffusion", "Q-Diffusion, split"]
    plots = metric_plots(rows)
    assert [plot.column.key for plot in plots] == ["fid", "isc", "psnr"]
    for plot in plots:
        shown = [i for i, entry in enumerate(rows) if entry.get(plot.column.key) is not None]
        lines = re.findall("<title>(.*?)</title>", plot.against_bits)
        assert [lines.count(s.name) for s in series_of(rows)] == [bool({*shown} & {*s.rows}) for s in series_of(rows)]
        points = re.findall("<title>(.*?):", plot.against_size)
        assert [points.count(label) for label in QUANTIZED] == [int(1 + n in shown) for n in range(len(QUANTIZED))]
    assert [name for name, _ in legend(rows)] == [*names, "float", "hollow, dotted: as published"]
    assert "float: FID 4.22 as published" in plots[0].against_bits
    assert [plot.spread for plot in plots] == [False, True, False]


def test_a_methods_colour_is_the_same_whichever_others_there_are():
    rows = results()
    alone = series_of(rows[2:3])[0]
    beside = series_of(rows)[1]
    assert (alone.colour, alone.marker) == (beside.colour, beside.marker)
    assert len({series.colour for series in series_of(rows)}) == 2  # split is the same method


@pytest.mark.slow
def test_points_say_what_they_are():
    plots = metric_plots(results())
    titles = re.findall("<title>(.*?)</title>", plots[0].against_size)
    assert "Q-Diffusion W4A8: FID 4.93, 18.40 MB" in titles
    sized = row("a", "linear", 8, 8, fid=1.0, bytes=1e6)
    plots = metric_plots([sized, row("b", "linear", 4, 8, psnr=30.0)])
    assert [(p.column.key, p.against_size is None) for p in plots] == [("fid", False), ("psnr", True)]


@pytest.mark.slow
def test_equal_rows_give_equal_bytes(tmp_path, text):
    again = written(tmp_path, results(), image_folders(tmp_path, results()), notes=["A note."])
    assert again == text


def test_floats_images_are_embedded_once_and_differences_amplified(page, text):
    assert len(re.findall(r"url\(data:image/png", text)) == 1
    beside = [a for a, _ in page.all("span") if "float-images" in a.get("class", "")]
    assert len(beside) == 4  # in its own row, and beside each quantized one
    pictures = panels(page)
    assert [a["alt"] for a in pictures] == [
        name for label in QUANTIZED for name in (f"Images: {label}", f"Images: |difference| × {AMPLIFIED}")
    ]
    assert all("pixelated" in a["class"] for a in pictures)
    images, difference = decoded(pictures[2]["src"]), decoded(pictures[3]["src"])
    assert images.shape == (8, 5 * 9 - 1, 3)  # five images, a white line between
    assert (images[0, 9], difference[0, 9]) == (pytest.approx([20] * 3), pytest.approx([10 * AMPLIFIED] * 3))


@pytest.mark.slow
def test_rows_show_the_images_that_all_of_them_have(tmp_path):
    rows = results()
    folders = image_folders(tmp_path, rows)
    (folders["linear W8A8"] / "00003.png").unlink()
    del folders["Q-Diffusion W8A8"]
    page = Page(written(tmp_path, rows, folders))
    pictures = panels(page)
    assert len(pictures) == 4 and {decoded(a["src"]).shape[1] for a in pictures} == {4 * 9 - 1}
    assert any("The first 4 images" in shown for _, shown in page.all("p"))
    assert [a["alt"].removeprefix("First images: ") for a in strips(page)] == list(folders)
    assert {decoded(a["src"]).shape[1] for a in strips(page)} == {4 * 9 - 1}


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_are_shrunk(channels, tmp_path):
    rows = results()[:2]
    page = Page(written(tmp_path, rows, image_folders(tmp_path, rows, size=300, count=2, channels=channels)))
    picture = panels(page)[0]
    assert picture["width"] == str(2 * SHRUNK_TO + 1) and "pixelated" not in picture["class"]
    assert decoded(picture["src"]).shape[:2] == (SHRUNK_TO, 2 * SHRUNK_TO + 1)
    assert decoded(strips(page)[0]["src"]).shape[:2] == (STRIP_SHRUNK_TO, 2 * STRIP_SHRUNK_TO + 1)


@pytest.mark.slow
def test_an_error_leaves_the_old_page(tmp_path, monkeypatch):
    before = written(tmp_path, results()[:1])

    def fail(rows):
        raise RuntimeError

    monkeypatch.setattr(page_module, "legend", fail)
    with pytest.raises(RuntimeError):
        written(tmp_path, results())
    assert [file.name for file in tmp_path.iterdir()] == ["table.html"]
    assert (tmp_path / "table.html").read_text(encoding="utf-8") == before


def test_pictures_and_table_come_before_plots_and_protocol(text):
    places = [text.index(f'<h2 id="{part}">') for part in ("images", "table", "plots", "protocol", "rows")]
    assert places == sorted(places)
