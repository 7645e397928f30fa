"""Kept results of a table: rows that were run elsewhere are shown, and not run again."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from digit_runs import QUANTIZED

from qdiff.cli import table as module
from qdiff.cli.kept_results import IMAGES
from qdiff.cli.tables_page import tables_page
from qdiff.errors import UserError
from qdiff.io.images import load_png, save_png

pytestmark = pytest.mark.slow

METRICS = ["fid", "fidelity"]
FLOAT, W4, W8 = {"label": "float"}, {"label": "W4", "options": QUANTIZED}, {"label": "W8", "options": "--ptq"}
SEEDS = {"label": "W8", "options": "--ptq", "seeds": [1, 7]}


@pytest.fixture
def kept(table, tmp_path):
    """A folder with the results of float and W4, whose run folders are gone."""
    table.changed["w4"] = 9
    table.before = table.run([FLOAT, W4], results=tmp_path / "kept", metrics=METRICS)
    table.page = (table.out / "table.md").read_text()
    table.pictures = (table.out / "table.html").read_text().count("data:image/")
    shutil.rmtree(table.out)
    return tmp_path / "kept"


def test_kept_rows_are_shown_and_not_run(table, kept):
    assert table.run([FLOAT, W4], results=kept, metrics=METRICS) == table.before
    assert table.commands == [] and not (table.out / "w4").exists()
    assert (table.out / "table.md").read_text() == table.page
    table.run([FLOAT, W4], metrics=METRICS)  # without the folder
    assert table.commands == [("sample", "float"), ("sample", "w4")]


def test_kept_images_are_shown(table, kept, digits):
    table.run([FLOAT, W4], results=kept, metrics=METRICS)
    images = np.clip(digits[0].astype(int) + 9, 0, 255)
    for i in range(IMAGES):
        assert np.array_equal(load_png(table.out / "kept" / "w4" / f"{i:05d}.png"), images[i])
    assert (table.out / "table.html").read_text().count("data:image/") == table.pictures > 0
    tables_page(table.out / "all.html", "All", [table.file([FLOAT, W4], metrics=METRICS)])
    assert (table.out / "all.html").read_text().count("data:image/") == 2  # a strip of each


def test_a_row_that_is_missing_is_run_beside_float(table, kept):
    rows = table.run([FLOAT, W4, W8], results=kept, metrics=METRICS)
    assert table.commands == [("sample", "float"), ("sample", "w8")]  # float's images are compared with
    assert list(rows) == ["float", "W4", "W8"] and rows["W4"] == table.before["W4"]
    shutil.rmtree(table.out)
    assert table.run([FLOAT, W4, W8], results=kept, metrics=METRICS) == rows and table.commands == []


def test_named_rows_are_run_and_kept_ones_shown(table, kept):
    assert list(table.run([FLOAT, W4, W8], "W4", results=kept, metrics=METRICS)) == ["float", "W4"]
    assert table.commands == []
    assert "Rows not yet run, or not with the table's present options: W8." in table.text()


@pytest.mark.parametrize("changed", ["options", "protocol"])
def test_other_options_and_another_protocol_are_run_again(changed, table, kept):
    if changed == "options":
        table.run([FLOAT, {**W4, "options": f"{QUANTIZED} --split"}], results=kept, metrics=METRICS)
        assert table.commands == [("sample", "float"), ("sample", "w4")]
        return
    file = kept / "t.json"
    text = file.read_text()
    assert text.count('"compared": 256') == 2
    file.write_text(text.replace('"compared": 256', '"compared": 255'))
    table.run([FLOAT, W4], results=kept, metrics=METRICS)
    assert table.commands == [("sample", "float"), ("sample", "w4")]
    assert json.loads(file.read_text()) == json.loads(text)


def test_weights_are_made_again_for_a_row_that_starts_from_them(table, kept):
    rows = [FLOAT, W4, {"label": "W4A8", "options": "--ptq", "weights_from": "W4"}]
    table.run(rows, results=kept, metrics=METRICS)
    assert [name for _, name in table.commands] == ["float", "w4", "w4a8"]
    shutil.rmtree(table.out)
    table.run(rows, results=kept, metrics=METRICS)
    assert table.commands == []
    rows[1] = {**W4, "options": f"{QUANTIZED} --split"}  # what it starts from is another
    table.run(rows, results=kept, metrics=METRICS)
    assert [name for _, name in table.commands] == ["float", "w4", "w4a8"]


def test_published_numbers_are_the_present_ones(table, kept):
    off = table.before["float"]["fid"] / 1.2
    with pytest.raises(UserError, match=r"FID .* misses the published"):
        table.run([{**FLOAT, "published": {"fid": off}}, W4], results=kept, metrics=METRICS)
    rows = table.run([FLOAT, {**W4, "published": {"fid": 3.5}}], results=kept, metrics=METRICS)
    assert rows["W4"]["published"] == {"fid": 3.5} and table.commands == []


def test_seeds_share_the_first_ones_picture(table, tmp_path):
    rows = table.run([FLOAT, SEEDS], results=tmp_path / "kept", metrics=METRICS)
    assert sorted(p.name for p in (tmp_path / "kept" / "t").iterdir()) == ["float.png", "w8-seed-1.png"]
    shutil.rmtree(table.out)
    assert table.run([FLOAT, SEEDS], results=tmp_path / "kept", metrics=METRICS) == rows and table.commands == []


def test_the_same_numbers_change_no_file(table, kept):
    table.run([FLOAT, W4, W8], results=kept, metrics=METRICS)
    times = {p: p.stat().st_mtime_ns for p in kept.rglob("*") if p.is_file()}
    table.run([FLOAT, W4, W8], results=kept, metrics=METRICS)
    assert {p: p.stat().st_mtime_ns for p in kept.rglob("*") if p.is_file()} == times
    assert str(table.folder) not in (kept / "t.json").read_text().replace(str(table.config), "")


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"version": 2, "rows": {}}', '{"version": 1, "rows": {"W4": {"command": []}}}', '{"version": 1}'],
)
def test_a_damaged_file_is_one_sentence(text, table, kept):
    (kept / "t.json").write_text(text)
    with pytest.raises(UserError, match=r"t\.json holds no kept results .*; correct it, or delete it") as caught:
        table.run([FLOAT, W4], results=kept, metrics=METRICS)
    assert "\n" not in str(caught.value) and table.commands == []


def rewritten(file, label, path, value):
    """Change one value of a kept row; `...` takes it away."""
    found = json.loads(file.read_text())
    inner = found["rows"][label]
    for key in path[:-1]:
        inner = inner[key]
    inner.pop(path[-1]) if value is ... else inner.update({path[-1]: value})
    file.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("result", "date"), ...),
        (("result", "machine"), 3),
        (("result", "images"), "20"),
        (("result", "fid"), "low"),
        (("result", "bytes"), "7"),
        (("run", "config"), {}),
        (("run", "files"), {"float weights": 3}),
    ],
)
def test_a_value_that_no_table_shows_is_one_sentence_before_any_work(path, value, table, kept):
    rewritten(kept / "t.json", "float", path, value)
    with pytest.raises(UserError, match=r"t\.json holds no kept results .*; correct it, or delete it"):
        table.run([FLOAT, W4, W8], results=kept, metrics=METRICS)
    assert table.commands == []


def test_rows_of_another_model_are_told_before_any_other_row_is_run(table, kept):
    rewritten(kept / "t.json", "W4", ("run", "files"), {"float weights": {"sha256": "a" * 64}})
    with pytest.raises(UserError, match=r"float weights 0{12}, but row W4 in .*t\.json of a{12}; delete that file"):
        table.run([FLOAT, W4, W8], results=kept, metrics=METRICS)
    assert table.commands == [("sample", "float")]


@pytest.mark.parametrize("damage", [lambda png: b"", lambda png: png[:-20], None])
def test_a_damaged_picture_is_one_sentence_before_any_work(damage, table, kept):
    picture = kept / "t" / "w4.png"
    if damage is None:  # another size
        save_png(load_png(picture)[:, 1:], picture)
    else:
        picture.write_bytes(damage(picture.read_bytes()))
    with pytest.raises(UserError, match=r"w4\.png is not the kept picture of 8 images; delete it"):
        table.run([FLOAT, W4, W8], results=kept, metrics=METRICS)
    assert table.commands == []
    picture.unlink()
    assert table.run([FLOAT, W4], results=kept, metrics=METRICS) == table.before


def test_rows_are_shown_without_any_picture(table, kept):
    shutil.rmtree(kept / "t")
    assert table.run([FLOAT, W4], results=kept, metrics=METRICS) == table.before
    assert table.commands == [] and not (table.out / "comparison.png").exists()


def test_float_is_run_if_only_another_named_row_is_kept(table, kept):
    found = json.loads((kept / "t.json").read_text())
    del found["rows"]["float"]
    (kept / "t.json").write_text(json.dumps(found))
    assert table.run([FLOAT, W4, W8], "W4", results=kept, metrics=METRICS) == table.before
    assert table.commands == [("sample", "float")]


def test_a_metric_that_a_kept_row_lacks_is_measured(table, kept):
    rows = table.run([FLOAT, W4], results=kept, metrics=[*METRICS, "kid"])
    assert table.commands == [("sample", "float"), ("sample", "w4")] and "kid" in rows["W4"]
    shutil.rmtree(table.out)
    table.run([FLOAT, W4], results=kept, metrics=METRICS)
    assert table.commands == []
    rewritten(kept / "t.json", "W4", ("metrics",), ...)  # kept without them
    table.run([FLOAT, W4], results=kept, metrics=[*METRICS, "kid"])
    assert table.commands == []


def test_a_kept_row_needs_no_checkpoint(table, tmp_path):
    checkpoint = tmp_path / "w4.pth"
    checkpoint.touch()
    rows = [FLOAT, {"label": "W4", "options": f"{QUANTIZED} --cali_ckpt {checkpoint}"}]
    before = table.run(rows, results=tmp_path / "kept", metrics=METRICS)
    shutil.rmtree(table.out)
    checkpoint.unlink()
    assert table.run(rows, "W4", results=tmp_path / "kept", metrics=METRICS) == before and table.commands == []


def test_rows_that_another_process_kept_stay(table, kept, monkeypatch):
    add, call = json.loads((kept / "t.json").read_text())["rows"]["W4"], table.call

    def meanwhile(command):
        call(command)
        found = json.loads((kept / "t.json").read_text())
        (kept / "t.json").write_text(json.dumps(found | {"rows": found["rows"] | {"W8": add}}))

    monkeypatch.setattr(module, "_call", meanwhile)
    other = {"label": "W3", "options": "--ptq --weight_bit 3"}
    table.run([FLOAT, W4, W8, other], "W3", results=kept, metrics=METRICS)
    assert list(json.loads((kept / "t.json").read_text())["rows"]) == ["float", "W4", "W8", "W3"]


def test_another_folder_whose_name_begins_alike_is_another(table, tmp_path):
    row = {"label": "W4", "options": f"{QUANTIZED} --cali_data_path {table.out}side/data.pt"}
    table.run([FLOAT, row], results=tmp_path / "kept", metrics=METRICS)
    (command,) = json.loads((tmp_path / "kept" / "t.json").read_text())["rows"]["W4"]["command"]
    assert command[-1] == f"{table.out}side/data.pt"
