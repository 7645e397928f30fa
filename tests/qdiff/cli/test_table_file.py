"""Table files: rows, commands, and what is wrong with them in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from digit_runs import QUANTIZED

from qdiff.cli.table import TableRun
from qdiff.cli.table_file import TableFile, TableRow, without
from qdiff.errors import UserError
from qdiff.evaluation.registry import metric_columns, named_metrics

SPEC = {
    "title": "T",
    "config": "configs/digits.yml",
    "script": "scripts/sample_diffusion_ddim.py",
    "options": "--config configs/digits.yml --max_images 3 --seed=1",
    "calibration": {"script": "scripts/collect_calibration.py", "options": "--cali_st 2"},
    "rows": [{"label": "float"}, {"label": "W4", "options": QUANTIZED}],
}
W4A8 = {"label": "W4A8", "options": f"{QUANTIZED} --quant_act", "weights_from": "W4"}


def grid(values, label="W{w}A{a}", **others) -> dict:
    """Changes of the spec: a float row, and one of a grid."""
    return {"rows": [{"label": "float"}, {"grid": values, "label": label, **others}]}


@pytest.fixture
def file(tmp_path):
    """``file(**changes)`` writes a table file and returns its path; a value ... leaves the key out."""

    def write(**changes) -> Path:
        path = tmp_path / "table.yaml"
        kept = {k: v for k, v in (SPEC | changes).items() if v is not ...}
        path.write_text(yaml.safe_dump(kept, sort_keys=False))  # a grid has an order
        return path

    return write


BAD_TABLES = {
    "no rows": ({"rows": []}, "no rows"),
    "without rows": ({"rows": ...}, "incomplete"),
    "without options": ({"options": ...}, "incomplete"),
    "row of words": ({"rows": ["float"]}, "incomplete"),
    "row without label": ({"rows": [{"options": ""}]}, "incomplete"),
    "row with an unknown key": ({"rows": [{"label": "a", "option": ""}]}, "option"),
    "weights from nowhere": ({"rows": [{"label": "a", "weights_from": "b"}]}, "not a row above it"),
    "weights from below": ({"rows": [{"label": "a", "weights_from": "b"}, {"label": "b"}]}, "not a row above it"),
    "one label twice": ({"rows": [{"label": "W4 A8"}, {"label": "w4/a8"}]}, "rename"),
    "skip of one word": ({"calibration": {"script": "s", "skip": "--max_images"}}, "give a list of options"),
    "skip of no option": ({"calibration": {"script": "s", "skip": [3]}}, "give a list of options"),
    "calibration with an unknown key": ({"calibration": {"script": "s", "option": ""}}, "option"),
    "calibration without a script": ({"calibration": {"options": ""}}, "script"),
    "config without an extractor": ({"config": "configs/tables/digits-demo.yaml"}, "pretrained.extractor"),
    "quantized row first": ({"rows": SPEC["rows"][::-1]}, "first row, W4, is quantized"),
    "unknown metric": ({"metrics": ["fid", "fidd"]}, "no 'fidd'; choose from fid, sfid"),
    "metrics in one word": ({"metrics": "fid"}, "'fid' is not a list"),
    "notes in one word": ({"notes": "a note"}, "'a note' is not a list"),
    "unknown published key": (
        {"rows": [{"label": "a", "published": {"is": 9.1}}]},
        "row a: published is: 9.1 is not a number",
    ),
    "published text": (
        {"rows": [{"label": "a", "published": {"fid": "4.2?"}}]},
        "row a: published fid: 4.2? is not a number",
    ),
    "published number alone": ({"rows": [{"label": "a", "published": 4.2}]}, "incomplete"),
    "label of another type": ({"rows": [{"label": 8}]}, "8 is not text"),
    "options of another type": ({"rows": [{"label": "a", "options": ["--ptq"]}]}, "['--ptq'] is not text"),
    "open quotation in a row": ({"rows": [{"label": "a", "options": "--x 'a"}]}, "No closing quotation"),
    "open quotation": ({"options": "--x 'a"}, "No closing quotation"),
    "empty options": ({"options": None}, "None is not text"),
    "grid in one word": (grid("w"), "grid W{w}A{a}: 'w' is not a mapping"),
    "empty grid": (grid({}), "grid W{w}A{a}: {} is not a mapping"),
    "grid of nothing": (grid(None), "None is not a mapping"),
    "grid of numbers": (grid({8: [4]}), "8 cannot be a name"),
    "grid with one value": (grid({"w": 8, "a": [8]}), "w is 8, which is not a list of values"),
    "grid with an empty list": (grid({"w": [8], "a": []}), "a is [], which is not a list of values"),
    "grid of lists": (grid({"w": [[8]], "a": [8]}), "w has [8], which is neither a number nor text"),
    "grid of YAML's on": (grid({"w": [True], "a": [8]}), "w has True, which is neither"),
    "unknown name in a grid's label": (grid({"w": [8]}), "label 'W{w}A{a}' has braces around something other than {w}"),
    "unknown name in a grid's options": (grid({"w": [8]}, "{w}", options="--x {y}"), "options '--x {y}' has braces"),
    "unknown name in a grid's weights": (grid({"w": [8]}, "{w}", weights_from="W{a}"), "weights_from 'W{a}' has"),
    "braces without a name": (grid({"w": [8]}, "W{}"), "label 'W{}' has braces around something other than"),
    "open brace": (grid({"w": [8]}, "W{w"), "label 'W{w' has braces"),
    "name of a value's part": (grid({"w": [8]}, "W{w.x}{w[0]}"), "has braces"),
    "published numbers of a grid": (grid({"w": [8]}, "{w}", published={"fid": 4.2}), "write that row out"),
    "grid without a label": ({"rows": [{"grid": {"w": [8]}, "options": "--ptq"}]}, "label"),
    "one label for a whole grid": (grid({"w": [8, 4]}, "W"), "rename W"),
    "grid that takes weights from nowhere": (grid({"w": [8]}, "{w}", weights_from="W{w}"), "not a row above it"),
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
    published = {column.key: 1 for column in metric_columns()}
    table = TableFile(file(metrics=named_metrics(), rows=[{"label": "float", "published": published}]))
    assert table.metrics == tuple(named_metrics()) and table.float_row.published == published


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


def test_finished_checkpoints_and_some_methods_share_no_calibration_data(file):
    for options, calibrates in ((f"{QUANTIZED} --cali_ckpt a.pth", False),
                                (f"{QUANTIZED} --cali_ckpt a.pth --quant_act --resume_w", True),
                                (f"{QUANTIZED} --method eda-dm", False), (f"{QUANTIZED} --method grip", False),
                                (f"{QUANTIZED} --method gptq", True),
                                (f"{QUANTIZED} --method grip --cali_spacing every", True),
                                (f"{QUANTIZED} --method gptq --cali_spacing ends", False),
                                (QUANTIZED, True), ("", False)):  # fmt: skip
        table = TableFile(file(rows=[{"label": "float"}, {"label": "row", "options": options}]))
        row = table.rows[1]
        assert row.calibrates is calibrates
        words = table.command(row, None)
        assert ("--cali_data_path" in words) is calibrates
        # A row that records its own set takes as many samples.
        assert ("--cali_st" in words) is (calibrates or "grip" in options or "ends" in options)


def test_a_grid_is_a_row_for_every_combination(file):
    quantized = "--ptq --weight_bit {w}"
    rows = [
        {"label": "float {w}", "options": "--prompt '{a}'"},  # no grid: braces are text
        {"grid": {"w": [8, 4]}, "label": "W{w}A32", "options": quantized, "own_recording": True},
        {
            "grid": {"w": [8, 4], "a": [6, "3"], "per": ["tensor", "sample"]},
            "label": "W{w}A{a} {per}",
            "options": f"{quantized} --act_bit {{a}} --act_scale_per {{per}}",
            "weights_from": "W{w}A32",
        },
    ]
    table = TableFile(file(rows=rows))
    expected = [f"W{w}A{a} {per}" for w in (8, 4) for a in (6, 3) for per in ("tensor", "sample")]
    assert [row.label for row in table.rows] == ["float {w}", "W8A32", "W4A32", *expected]
    assert table.rows[0].options == "--prompt '{a}'"
    assert all(row.own_recording for row in table.rows[1:3])
    row = table.rows[8]
    assert row == TableRow("W4A6 sample", "--ptq --weight_bit 4 --act_bit 6 --act_scale_per sample", "W4A32")
    assert table.base(row) is table.rows[2] and table.folder(row.label).name == "w4a6-sample"


def test_ranges_at_hand_with_weights_from_elsewhere_need_no_recording(file):
    dynamic = f"{QUANTIZED} --quant_act --quant_mode dynamic"
    rows = [
        *SPEC["rows"],
        {"label": "from a row", "options": dynamic, "weights_from": "W4"},
        {"label": "from a file", "options": f"{dynamic} --resume_w --cali_ckpt a.pth"},
        {"label": "fits weights", "options": dynamic},
        {"label": "static", "options": f"{QUANTIZED} --quant_act --quant_mode qdiff", "weights_from": "W4"},
    ]
    table = TableFile(file(rows=rows))
    assert [row.calibrates for row in table.rows[1:]] == [True, False, False, True, True]
    for row in table.rows:
        command = table.command(row, None)
        assert ("--cali_data_path" in command) == ("--cali_st" in command) == row.calibrates, row.label
    resumed = ["--resume_w", "--cali_ckpt", "runs/table/w4/quantized.safetensors"]
    assert table.command(table.rows[2], None)[-3:] == resumed


def test_missing_checkpoints_are_found(file, tmp_path):
    there, lacking = tmp_path / "there.pth", tmp_path / "lacking.pth"
    there.touch()
    table = TableFile(file())
    assert table.missing_checkpoint(TableRow("a", QUANTIZED)) is None
    assert table.missing_checkpoint(TableRow("a", f"{QUANTIZED} --cali_ckpt {there}")) is None
    assert table.missing_checkpoint(TableRow("a", f"{QUANTIZED} --cali_ckpt {lacking}")) == str(lacking)


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


def test_the_label_of_a_group_stands_for_all_its_seeds(file):
    row = {"label": "W4", "options": QUANTIZED, "seeds": [1, 7]}
    table = TableFile(file(rows=[{"label": "float"}, row]))
    assert [r.label for r in table.named("W4")] == ["W4 seed 1", "W4 seed 7"]
    assert [r.label for r in table.named("float,W4 seed 7")] == ["float", "W4 seed 7"]
    command = table.command(table.rows[2], None)
    assert (
        command[-4:] == ["-l", str(table.folder("W4 seed 7")), "--cali_st", "2"] and "--cali_data_path" not in command
    )
    assert command[command.index("--cali_seed") + 1] == "7"
