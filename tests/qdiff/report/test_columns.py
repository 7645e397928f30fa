"""The markdown table: which columns it has, in which order, and what its cells show."""

from __future__ import annotations

import pytest

from qdiff.evaluation.column import HIGHER, LOWER, NOTHING
from qdiff.evaluation.registry import metric_columns
from qdiff.report.columns import COSTS, columns_of, markdown

ROW = {
    "label": "W4A8",
    "fid": 3.14159,
    "isc": 9.05,
    "isc_std": 0.123,
    "kid": 0.00056,
    "kid_std": 0.0002,
    "noise_mse": 1.234e-3,
    "bytes": 17_890_000,
    "calibration_s": 61.6,
    "sampling_s": 7.4,
}
CELLS = ["W4A8", "3.14", "9.05 ± 0.12", "0.0006", "1.23e-03", "17.89 MB", "62 s", "7 s"]
HEADINGS = ["", "FID ↓", "IS ↑", "KID ↓", "ε error ↓", "file ↓", "calibration ↓", "sampling ↓"]


def cells(line: str) -> list[str]:
    assert line.startswith("| ") and line.endswith(" |")
    return [cell.strip() for cell in line[1:-1].split("|")]


def column(rows: list[dict], heading: str) -> list[str]:
    """Return the cells below a heading."""
    lines = [cells(line) for line in markdown(rows).splitlines()]
    return [line[lines[0].index(heading)] for line in lines[2:]]


def headings(rows: list[dict]) -> list[str]:
    return cells(markdown(rows).splitlines()[0])


def test_markdown_has_a_header_and_a_line_a_row():
    lines = markdown([ROW, ROW]).splitlines()
    assert cells(lines[0]) == HEADINGS and cells(lines[1]) == ["---"] * len(HEADINGS)
    assert cells(lines[2]) == cells(lines[3]) == CELLS and len(lines) == 4
    assert markdown([ROW], header=False) == lines[2]


@pytest.mark.parametrize("missing", [{}, {"noise_mse": None}])
def test_a_column_is_there_if_any_row_has_a_number_for_it(missing):
    bare = {"label": "float", "fid": 4.0} | missing
    assert headings([bare]) == ["", "FID ↓"]
    assert headings([bare, ROW]) == headings([ROW, bare]) == HEADINGS
    shown = cells(markdown([ROW, bare]).splitlines()[3])
    assert shown == ["float", "4.00"] + [NOTHING] * (len(HEADINGS) - 2)
    assert markdown([{"label": "nothing"}]).splitlines()[2] == "| nothing |"


def test_state_and_additions_are_there_where_a_row_modulates():
    modulated = {**ROW, "gbops": 2.0, "state_bytes": 1.9e6, "additions": 749_408}
    plain = {**ROW, "gbops": 2.0, "state_bytes": None, "additions": None}
    assert "state ↓" not in headings([plain])
    assert headings([plain, modulated])[-5:] == ["GBops ↓", "state ↓", "additions ↓", *HEADINGS[-2:]]
    assert column([plain, modulated], "state ↓") == [NOTHING, "1.90 MB"]


def test_zero_is_a_number():
    assert column([{"label": "x", "fid": 0.0, "noise_mse": 0}], "FID ↓") == ["0.00"]
    assert column([{"label": "x", "recall": 0.0}], "recall ↑") == ["0.000"]


def test_no_time_was_taken_by_what_was_not_done():
    rows = [{**ROW, "calibration_s": 0.0}, ROW]
    assert column(rows, "calibration ↓") == [NOTHING, "62 s"]


def test_asked_share_is_in_percent():
    rows = [ROW, {**ROW, "asked_share": 0.98765}, {**ROW, "asked_share": 0.0}]
    assert column(rows, "asked ↑") == [NOTHING, "98.8 %", "0.0 %"]
    assert headings(rows) == [*HEADINGS[:4], "asked ↑", *HEADINGS[4:]]


def test_only_is_shows_its_spread():
    assert column([ROW], "KID ↓") == ["0.0006"]  # its spread is that of subsets
    assert column([{**ROW, "isc_std": 0.0}], "IS ↑") == ["9.05"]  # one part has none
    assert column([{"label": "x", "isc": 9.05}], "IS ↑") == ["9.05"]


@pytest.mark.parametrize(
    ("key", "number", "heading", "text"),
    [
        ("sfid", 7.005, "sFID ↓", "7.00"),
        ("precision", 0.61249, "precision ↑", "0.612"),
        ("recall", 0.5, "recall ↑", "0.500"),
        ("clip_score", 31.456, "CLIP ↑", "31.46"),
        ("psnr", 23.46, "PSNR ↑", "23.5 dB"),
        ("ssim", 0.98765, "SSIM ↑", "0.988"),
        ("lpips", 0.0123, "LPIPS ↓", "0.012"),
        ("last_step_mse", 0.0213, "ε last step ↓", "2.13e-02"),
        ("mean_weight_bits", 4.4961, "mean W bits ↓", "4.50"),
        ("mean_act_bits", 8.0, "mean A bits ↓", "8.00"),
        ("counted_bytes", 4_500_000, "counted ↓", "4.50 MB"),
        ("gbops", 6597.04, "GBops ↓", "6,597.0"),
        ("state_bytes", 1_900_416, "state ↓", "1.90 MB"),
        ("additions", 749_408, "additions ↓", "0.75 M"),
    ],
)
def test_how_numbers_are_written(key, number, heading, text):
    assert column([{"label": "x", key: number}], heading) == [text]


def test_published_numbers_stand_right_of_ours():
    rows = [{**ROW, "published": {"fid": 4.22, "isc": 9.12}}, ROW]
    assert headings(rows) == ["", "FID ↓", "FID (paper) ↓", "IS ↑", "IS (paper) ↑", *HEADINGS[3:]]
    assert column(rows, "FID (paper) ↓") == ["4.22", NOTHING]
    assert column(rows, "IS (paper) ↑") == ["9.12", NOTHING]  # our spread is not the paper's
    assert column(rows, "FID ↓") == ["3.14", "3.14"] and column(rows, "IS ↑") == ["9.05 ± 0.12"] * 2


def test_a_published_number_without_ours_has_its_own_column_only():
    assert headings([{"label": "x", "published": {"sfid": 7.0}}]) == ["", "sFID (paper) ↓"]


@pytest.mark.parametrize("published", [None, {}])
def test_rows_may_say_that_nothing_is_published(published):
    assert markdown([{**ROW, "published": published}]) == markdown([ROW])


def test_what_a_paper_says_of_costs_has_no_column():
    assert headings([{**ROW, "published": {"gbops": 6597.0}}]) == HEADINGS


def test_values_are_there_for_sorting_and_plots():
    rows = [{**ROW, "published": {"fid": 4.22}}, {"label": "float"}]
    found = {column.heading: [column.value(row) for row in rows] for column in columns_of(rows)}
    assert found["FID ↓"] == [3.14159, None] and found["FID (paper) ↓"] == [4.22, None]
    assert found["file ↓"] == [17_890_000, None]


def test_keys_and_headings_are_unique_and_each_column_has_a_better_side():
    every = (*metric_columns(), *COSTS)
    assert len({column.key for column in every}) == len({column.heading for column in every}) == len(every)
    assert {column.better for column in every} == {LOWER, HIGHER}
    assert all(column.better == LOWER for column in COSTS)
    assert {column.key for column in metric_columns() if column.better == LOWER} == {"fid", "sfid", "kid", "lpips"}
