"""Table files: rows, commands, and what is wrong with them in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from digit_runs import QUANTIZED

from qdiff.cli.table import TableRun
from qdiff.cli.table_file import MEASURABLE, Row, TableFile, without
from qdiff.errors import UserError
from qdiff.evaluation.columns import METRICS

SPEC = {
    "title": "T",
    "config": "configs/digits.yml",
    "script": "scripts/sample_diffusion_ddim.py",
    "options": "--config configs/digits.yml --max_images 3 --seed=1",
    "calibration": {"script": "scripts/collect_calibration.py", "options": "--cali_st 2"},
    "rows": [{"label": "float"}, {"label": "W4", "options": QUANTIZED}],
}
W4A8 = {"label": "W4A8", "options": f"{QUANTIZED} --quant_act", "weights_from": "W4"}


@pytest.fixture
def file(tmp_path):
    """``file(**changes)`` writes a table file and returns its path; a value ... leaves the key out."""

    def write(**changes) -> Path:
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in (SPEC | changes).items() if v is not ...}))
        return path

    return write


BAD_TABLES = {
    "no rows": ({"rows": []}, "no rows"),
    "without rows": ({"rows": ...}, "incomplete"),
    "without options": ({"options": ...}, "incomplete"),
    "row of words": ({"rows": ["float"]}, "incomplete"),
    "row without label": ({"rows": [{"options": ""}]}, "incomplete"),
    "row with an unknown key": ({"rows": [{"label": "a", "option": ""}]}, "option"),
    "weights from nowhere": ({"rows": [{"label": "a", "weights_from": "b"}]}, "no row above"),
    "weights from below": ({"rows": [{"label": "a", "weights_from": "b"}, {"label": "b"}]}, "no row above"),
    "one label twice": ({"rows": [{"label": "W4 A8"}, {"label": "w4/a8"}]}, "rename"),
    "skip of one word": ({"calibration": {"script": "s", "skip": "--max_images"}}, "give a list of options"),
    "skip of no option": ({"calibration": {"script": "s", "skip": [3]}}, "give a list of options"),
    "calibration with an unknown key": ({"calibration": {"script": "s", "option": ""}}, "option"),
    "calibration without a script": ({"calibration": {"options": ""}}, "script"),
    "config without an extractor": ({"config": "configs/tables/digits-demo.yaml"}, "pretrained.extractor"),
    "quantized row first": ({"rows": SPEC["rows"][::-1]}, "first row, W4, is quantized"),
    "unknown metric": ({"metrics": ["fid", "fidd"]}, "'fidd' is none of fid, sfid"),
    "metrics in one word": ({"metrics": "fid"}, "'fid' is no list"),
    "notes in one word": ({"notes": "a note"}, "'a note' is no list"),
    "unknown published key": ({"rows": [{"label": "a", "published": {"is": 9.1}}]}, "row a: published is: 9.1 is no"),
    "published text": ({"rows": [{"label": "a", "published": {"fid": "4.2?"}}]}, "row a: published fid: 4.2? is no"),
    "published number alone": ({"rows": [{"label": "a", "published": 4.2}]}, "incomplete"),
    "label of another type": ({"rows": [{"label": 8}]}, "8 is no text"),
    "options of another type": ({"rows": [{"label": "a", "options": ["--ptq"]}]}, "['--ptq'] is no text"),
    "open quotation in a row": ({"rows": [{"label": "a", "options": "--x 'a"}]}, "No closing quotation"),
    "open quotation": ({"options": "--x 'a"}, "No closing quotation"),
    "empty options": ({"options": None}, "None is no text"),
    "config of no model": ({"config": "configs/none.yml"}, "none.yml does not exist"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_one_sentence(name, file, tmp_path):
    changes, says = BAD_TABLES[name]
    with pytest.raises(UserError) as caught:
        TableRun(TableFile(file(**changes), tmp_path / "out"))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "[1]", "a: ["])
def test_other_files_are_one_sentence(content, tmp_path):
    (tmp_path / "t.yaml").write_text(content)
    with pytest.raises(UserError, match=r"t\.yaml"):
        TableFile(tmp_path / "t.yaml")
    with pytest.raises(UserError, match="does not exist"):
        TableFile(tmp_path / "none.yaml")


def test_every_measurable_and_publishable_number_is_accepted(file):
    published = {column.key: 1 for column in METRICS}
    table = TableFile(file(metrics=list(MEASURABLE), rows=[{"label": "float", "published": published}]))
    assert table.metrics == MEASURABLE and table.float_row.published == published


def test_what_the_table_names_goes_before_the_config(file):
    table = TableFile(file())
    assert (table.extractor, table.reference) == ("digits-classifier", "models/digits_reference.npz")
    assert table.out == Path("runs/table") and table.notes == [] and table.source is None
    table = TableFile(file(extractor="other", reference="lsun", notes=["a", "b"], clip_model="c"), "out")
    assert (table.extractor, table.reference, table.clip_model) == ("other", "lsun", "c")
    assert table.notes == ["a", "b"] and table.out == Path("out")


def test_commands(file):
    table = TableFile(file(rows=[*SPEC["rows"], W4A8]), "out")
    common = ["--config", "configs/digits.yml", "--max_images", "3", "--seed=1"]
    quantized = ["--cali_data_path", "out/calibration_data.pt", "--cali_st", "2"]
    script, *words = table.command(table.rows[0], "cpu")
    assert script == SPEC["script"] and words == [*common, "--device", "cpu", "-l", "out/float"]
    assert table.command(table.rows[1], None)[1:] == [*common, *QUANTIZED.split(), "-l", "out/w4", *quantized]
    resumed = ["--resume_w", "--cali_ckpt", "out/w4/quantized.safetensors"]
    assert table.command(table.rows[2], None)[1:] == [
        *common, *QUANTIZED.split(), "--quant_act", "-l", "out/w4a8", *quantized, *resumed
    ]  # fmt: skip
    assert table.recording_command("cpu") == [
        "scripts/collect_calibration.py", "--like", "sample_diffusion_ddim", "--config", "configs/digits.yml",
        "--seed=1", "--cali_st", "2", "--device", "cpu", "--out", "out/calibration_data.pt",
    ]  # fmt: skip


def test_a_finished_checkpoint_needs_no_calibration_data(file):
    for options, calibrates in ((f"{QUANTIZED} --cali_ckpt a.pth", False),
                                (f"{QUANTIZED} --cali_ckpt a.pth --quant_act --resume_w", True),
                                (QUANTIZED, True), ("", False)):  # fmt: skip
        table = TableFile(file(rows=[{"label": "float"}, {"label": "row", "options": options}]))
        row = table.rows[1]
        assert row.calibrates is calibrates
        assert ("--cali_data_path" in table.command(row, None)) is calibrates


def test_missing_checkpoints_are_found(file, tmp_path):
    there, lacking = tmp_path / "there.pth", tmp_path / "lacking.pth"
    there.touch()
    table = TableFile(file())
    assert table.missing_checkpoint(Row("a", QUANTIZED)) is None
    assert table.missing_checkpoint(Row("a", f"{QUANTIZED} --cali_ckpt {there}")) is None
    assert table.missing_checkpoint(Row("a", f"{QUANTIZED} --cali_ckpt {lacking}")) == str(lacking)


def test_options_are_taken_out_with_their_values():
    words = ["--a", "1", "--b=2", "--c", "--a=3", "4", "--a"]
    assert without(words, ["--a"]) == ["--b=2", "--c", "4"]
    assert without(words, ["--b", "--c"]) == ["--a", "1", "4", "--a"]


def test_methods_that_draw_their_own_samples_take_no_recording(file):
    rows = [
        {"label": "float"},
        {"label": "EDA-DM", "options": f"{QUANTIZED} --method eda-dm"},
        {"label": "seed 7", "options": f"{QUANTIZED} --cali_seed 7", "own_recording": True},
    ]
    table = TableFile(file(rows=rows))
    drawn, own = (table.command(row, None) for row in table.rows[1:])
    assert not {"--cali_data_path", "--cali_st"} & set(drawn)
    # Its recording is another one, of as many steps and samples.
    assert "--cali_data_path" not in own and own[own.index("--cali_st") + 1] == "2"
    assert not any(row.calibrates for row in table.rows)
