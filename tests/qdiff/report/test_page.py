"""The web page of results: self-contained, sortable, and showing the numbers that the rows have."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from qdiff.evaluation.column import NOTHING
from qdiff.io.images import save_png
from qdiff.report import page as page_module
from qdiff.report.columns import columns_of
from qdiff.report.page import TableResults, write_page, write_tables_page
from qdiff.report.page_pictures import AMPLIFIED, SHRUNK_TO, STRIP_SHRUNK_TO
from qdiff.report.plots import legend, metric_plots, series_of, shape_legend

VOID = {"meta", "link", "img", "path", "use", "br"}
QUANTIZED = ("linear W8A8", "Q-Diffusion W8A8", "Q-Diffusion W4A8")


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


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    return written(folder, results(), image_folders(folder, results()), notes=["A note."])


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def strips(page: Page) -> list[dict]:
    return [a for a, _ in page.all("img") if a["alt"].startswith("First images: ")]


def panels(page: Page) -> list[dict]:
    return [a for a, _ in page.all("img") if a["alt"].startswith("Images: ")]


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


def test_the_page_needs_nothing_from_outside(page, text):
    for _tag, attributes, _ in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert all(found.startswith(("data:", "#")) for found in re.findall(r"url\(['\"]?([^)]*)", text))
    assert "http:" not in text and "https:" not in text and "@import" not in text
    policy = next(a["content"] for a, _ in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


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
    rows = [row(label, "linear", 8, 8, fid=3.0) for label in "ab"]
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
    test_the_page_needs_nothing_from_outside(page, text)
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
