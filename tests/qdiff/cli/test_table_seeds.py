"""Rows with several calibration seeds: how they are written, and what is shown of them."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from qdiff.cli.table_file import TableRow
from qdiff.cli.table_grid import expand
from qdiff.cli.table_seeds import not_shown, summarise
from qdiff.errors import UserError


def test_one_row_for_each_seed():
    rows = [TableRow(**row) for row in expand({"label": "A", "options": "--ptq", "seeds": [1, 7]})]
    assert [row.label for row in rows] == ["A seed 1", "A seed 7"]
    assert [row.options for row in rows] == ["--ptq --cali_seed 1", "--ptq --cali_seed 7"]
    assert all(row.group == "A" and row.own_recording and row.weights_from is None for row in rows)


def test_weights_come_from_the_same_seed():
    rows = expand({"label": "A", "options": "--ptq", "weights_from": "W", "seeds": [1, 7]})
    assert [row["weights_from"] for row in rows] == ["W seed 1", "W seed 7"]


def test_a_grid_of_seeds():
    rows = expand({"grid": {"w": [8, 4]}, "label": "W{w}", "options": "--weight_bit {w}", "seeds": [1, 7]})
    assert [row["label"] for row in rows] == ["W8 seed 1", "W8 seed 7", "W4 seed 1", "W4 seed 7"]
    assert [row["group"] for row in rows] == ["W8", "W8", "W4", "W4"]


@pytest.mark.parametrize("seeds", [[], 3, ["1"], [True], [-1]])
def test_seeds_are_whole_numbers(seeds):
    with pytest.raises(UserError, match=r"row A: seeds is .*; give a list of whole numbers from 0"):
        expand({"label": "A", "options": "--ptq", "seeds": seeds})


def test_a_seed_comes_once():
    with pytest.raises(UserError, match="row A: a seed is listed twice; list it once"):
        expand({"label": "A", "options": "--ptq", "seeds": [1, 1]})


def result(label, **values):
    return {
        "label": label,
        "method": "qdiff",
        "weight_bits": 4,
        "flags": [],
        "command": label,
        "published": {},
        **values,
    }


ROWS = [TableRow("float"), *(TableRow(f"A seed {s}", "--ptq", group="A") for s in (1, 7, 9))]


def test_means_and_deviations():
    errors = [1.0, 2.0, 6.0]
    results = [
        result("float", noise_mse=None),
        *(result(r.label, noise_mse=e) for r, e in zip(ROWS[1:], errors, strict=True)),
    ]
    shown, folders = summarise(ROWS, results, Path)
    assert [row["label"] for row in shown] == ["float", "A"]
    assert shown[0] is results[0]
    assert shown[1]["noise_mse"] == pytest.approx(3.0)
    assert shown[1]["noise_mse_std"] == pytest.approx(statistics.stdev(errors))
    assert shown[1]["seeds"] == 3 and shown[1]["weight_bits"] == 4 and shown[1]["weight_bits_std"] == 0.0
    assert folders == {"float": Path("float"), "A": Path("A seed 1")}


def test_the_spread_of_seeds_replaces_a_numbers_own():
    results = [result(r.label, isc=v, isc_std=100.0) for r, v in zip(ROWS[1:], (8.0, 9.0, 10.0), strict=True)]
    shown, _ = summarise(ROWS, results, Path)
    assert (shown[0]["isc"], shown[0]["isc_std"]) == (9.0, 1.0)


def test_unfinished_seeds_are_counted_and_missing_numbers_left_out():
    results = [result(ROWS[1].label, fid=1.0, psnr=None, flags=["off"]), result(ROWS[2].label, fid=2.0, psnr=3.0)]
    shown, _ = summarise(ROWS, results, Path)
    assert shown[0]["seeds"] == 2 and shown[0]["fid"] == 1.5 and shown[0]["flags"] == ["off"]
    assert shown[0]["psnr"] is None and "psnr_std" not in shown[0]
    shown, _ = summarise(ROWS, results[:1], Path)
    assert shown[0]["seeds"] == 1 and shown[0]["fid_std"] == 0.0


def test_a_number_that_only_the_first_seed_has_is_left_out():
    results = [result(ROWS[1].label, last_step_mse=1.0), result(ROWS[2].label, last_step_mse=None)]
    shown, _ = summarise(ROWS, results, Path)
    assert shown[0]["last_step_mse"] is None and "last_step_mse_std" not in shown[0]


def test_rows_that_are_not_shown():
    assert not_shown(ROWS, []) == ["float", "A"]
    assert not_shown(ROWS, [result("float"), result("A seed 7")]) == ["A seed 1", "A seed 9"]
    assert not_shown(ROWS, [result(row.label) for row in ROWS]) == []
