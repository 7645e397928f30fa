"""The table from the papers' code to ours names what exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from qdiff.weight_forms import WeightForm

DOCUMENT = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLE = DOCUMENT.split("## From the papers' code to here")[1].split("\n## ")[0]
NAMES = [
    name
    for line in TABLE.splitlines()
    if line.startswith("| ") and not line.startswith("| there")
    for name in re.findall(r"`((?:qdiff|ddim|ldm)\.[\w.]+)`", line.split("|")[2])
]


def test_the_table_is_there():
    assert len(NAMES) > 25


@pytest.mark.parametrize("name", NAMES)
def test_each_name_exists(name):
    module, attribute = name.rsplit(".", 1)
    assert hasattr(importlib.import_module(module), attribute)


def test_files_of_the_walk_through_exist():
    text = DOCUMENT.split("## One run, from argv to PNG")[1]
    paths = re.findall(r"`((?:qdiff|ddim|scripts)/[\w/]+\.py)", text)
    assert len(paths) > 8
    assert [path for path in paths if not (Path(__file__).parents[1] / path).is_file()] == []


def test_the_forms_of_a_weight_are_all_there():
    text = DOCUMENT.split("## The forms of a weight")[1].split("\n## ")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ") and not line.startswith("| form")]
    named = {name for row in rows for name in re.findall(r"`([A-Z]+)`", row[1])}
    assert named == {form.name for form in WeightForm}
    files = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[5])]
    assert len(files) > len(rows)
    assert [name for name in files if not (Path(__file__).parents[1] / "qdiff" / name).is_file()] == []
