"""Tables: the float row first, published numbers beside ours, and what was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from digit_runs import COUNT, QUANTIZED
from PIL import Image

from qdiff.cli import table as module
from qdiff.cli.table_numbers import misses
from qdiff.errors import UserError
from qdiff.evaluation import extractors
from qdiff.evaluation.registry import metric_columns

W4 = {"label": "W4", "options": QUANTIZED}


def rows_of(**published: float) -> list[dict]:
    return [{"label": "float", "published": published}, W4]


@pytest.fixture
def fid(table):
    """FID of the float row, which every test of the baseline publishes some per cent off."""
    return table.run([{"label": "float"}])["float"]["fid"]


# ---------------------------------------------------------------------- the baseline


def test_float_that_misses_its_published_number_stops_the_table(table, fid):
    page = (table.out / "table.html").read_bytes()
    wanted = fid / 1.06
    with pytest.raises(UserError) as caught:
        table.run(rows_of(fid=wanted))
    sentence = str(caught.value)
    assert f"FID {fid:.2f} misses the published {wanted:.2f} by 6 %" in sentence
    assert "--force" in sentence and "\n" not in sentence
    assert table.commands == [("sample", "float")]
    assert (table.out / "table.html").read_bytes() == page and not (table.out / "w4").exists()


@pytest.mark.slow
def test_five_per_cent_are_allowed(table, fid):
    for wanted in (fid / 1.04, fid * 1.04):
        assert table.run(rows_of(fid=wanted))["float"]["flags"] == []
    assert "misses" not in table.text()
    with pytest.raises(UserError, match="misses"):
        table.run(rows_of(fid=fid * 1.07))  # better than published: as suspicious


@pytest.mark.slow
def test_every_published_metric_counts(table, fid):
    score = table.run([{"label": "float"}])["float"]["isc"]
    with pytest.raises(UserError, match=r"IS .* misses the published"):
        table.run(rows_of(fid=fid, isc=score / 1.06))
    assert table.run(rows_of(fid=fid, isc=score, precision=0.1, clip_score=31.5))  # those are not measured here


@pytest.mark.parametrize("column", metric_columns(), ids=lambda column: column.key)
def test_misses_of_each_metric(column):
    def row(value: float) -> dict:
        return {column.key: value, "published": {column.key: 10.0}}

    assert misses(row(10.4)) == misses(row(9.6)) == misses({"published": {column.key: 10.0}}) == []
    for value in (10.6, 9.4):
        (sentence,) = misses(row(value))
        assert column.title in sentence and column.write(value) in sentence and column.write(10.0) in sentence
        assert "6 %" in sentence


def test_force_goes_on_and_flags(table, fid):
    rows = table.run(rows_of(fid=fid / 1.06), force=True)
    assert table.commands == [("sample", "float"), ("sample", "w4")]
    sentence = f"FID {fid:.2f} misses the published {fid / 1.06:.2f} by 6 %"
    assert rows["float"]["flags"] == [sentence] and rows["W4"]["flags"] == []
    assert f"**float: {sentence}.**" in table.text()
    assert sentence in (table.out / "table.html").read_text()


@pytest.mark.slow
def test_quantized_rows_are_not_held_to_their_published_numbers(table, fid):
    rows = table.run([{"label": "float"}, {**W4, "published": {"fid": 2 * fid}}])
    assert rows["W4"]["flags"] == [] and rows["W4"]["published"] == {"fid": 2 * fid}


@pytest.mark.slow
def test_finished_float_is_checked_when_a_quantized_row_is_asked_for(table, fid):
    with pytest.raises(UserError, match="by 6 %"):
        table.run(rows_of(fid=fid / 1.06), named="W4")
    assert table.commands == []
    assert set(table.run(rows_of(fid=fid / 1.06), named="W4", force=True)) == {"float", "W4"}
    assert table.commands == [("sample", "w4")]


@pytest.mark.slow
def test_float_is_added_where_it_is_not_finished(table):
    assert list(table.run(rows_of(), named="W4")) == ["float", "W4"]
    assert table.commands == [("sample", "float"), ("sample", "w4")]
    table.run(rows_of(), named="W4")
    assert table.commands == [("sample", "w4")]
    (table.out / "float" / "img" / "00003.png").unlink()
    table.run(rows_of(), named="W4")
    assert table.commands == [("sample", "float"), ("sample", "w4")]


# ---------------------------------------------------------------------- published numbers


@pytest.mark.slow
def test_published_numbers_stand_beside_ours(table, fid):
    wanted = [
        {"label": "float", "published": {"fid": fid}},
        {**W4, "published": {"fid": 5.09, "isc": 8.78}, "unverified": True},
        {"label": "W3", "options": "--ptq --weight_bit 3"},
    ]
    rows = table.run(wanted, source="Somebody et al. 2023", notes=["Fifty thousand images."])
    assert rows["W4"]["published"] == {"fid": 5.09, "isc": 8.78} and rows["W3"]["published"] == {}
    headings = list(table.cells("W4"))
    assert headings.index("FID (paper) ↓") == headings.index("FID ↓") + 1
    assert headings.index("IS (paper) ↑") == headings.index("IS ↑") + 1
    assert table.cells("W4")["FID (paper) ↓"] == "5.09" and table.cells("W4")["IS (paper) ↑"] == "8.78"
    assert table.cells("W4")["FID ↓"] == f"{rows['W4']['fid']:.2f}" != "5.09"
    assert table.cells("W3")["FID (paper) ↓"] == "–"
    about = json.loads((table.out / "table.json").read_text())
    assert about["source"] == about["protocol"]["published numbers"] == "Somebody et al. 2023"
    quoted = "quoted from memory of the paper, to be verified: W4."
    page = (table.out / "table.html").read_text()
    for shown in (table.text(), page, " ".join(about["notes"])):
        assert quoted in shown and "Fifty thousand images." in shown
    assert "Somebody et al. 2023" in page and "5.09" in page


@pytest.mark.slow
def test_without_published_numbers_there_is_no_word_of_them(table):
    table.run(rows_of())
    assert "paper" not in table.text() and "published" not in table.text()


@pytest.mark.slow
def test_costs_come_from_the_manifests(table):
    rows = table.run(rows_of())
    assert rows["W4"]["counted_bytes"] == 1_500_000 and rows["W4"]["gbops"] == pytest.approx(2.5, rel=1e-12)
    assert table.cells("W4")["counted ↓"] == "1.50 MB" and table.cells("W4")["GBops ↓"] == "2.5"


@pytest.mark.slow
def test_errors_and_mean_widths_come_from_the_run_folders(table, monkeypatch):
    def call(command: list[str]) -> None:
        table.call(command)
        folder = Path(command[command.index("-l") + 1])
        manifest = json.loads((folder / "run.json").read_text())
        if folder.name == "w4":
            manifest["noise_error"] = {"mse": 1e-3, "last_step": 2e-1, "last_timestep": 0.0}
            widths = {"mean_bits": 4.5, "mean_act_bits": None, "layer_bits": []}
            (folder / "widths.json").write_text(json.dumps(widths))
        elif folder.name == "older":
            manifest["noise_error"] = {"mse": 2e-3}
        (folder / "run.json").write_text(json.dumps(manifest))

    monkeypatch.setattr(module, "_call", call)
    table.run([{"label": "float"}, W4, {"label": "older", "options": QUANTIZED}])
    names = ("ε error ↓", "ε last step ↓", "mean W bits ↓")
    cells = {label: [table.cells(label)[name] for name in names] for label in ("float", "W4", "older")}
    assert cells == {"float": ["–"] * 3, "W4": ["1.00e-03", "2.00e-01", "4.50"], "older": ["2.00e-03", "–", "–"]}
    assert "mean A bits" not in table.text() and "ε last step the same for" in table.text()
    assert "mean W, A bits of mixed precision" in table.text()


WIDTHS = (8, 6, 4)
MODULATED = {"act_dynamic": True, "modulate": True, "act_scale_per": "sample"}


@pytest.fixture
def quantized(table, monkeypatch):
    """``quantized(**quant)``: rows of three activation widths, whose runs say that they were quantized like this."""

    def rows(**quant) -> list[dict]:
        def call(command: list[str]) -> None:
            table.call(command)
            folder = Path(command[command.index("-l") + 1])
            if folder.name == "float":
                return
            manifest = json.loads((folder / "run.json").read_text())
            width = int(folder.name.removeprefix("w4a"))
            manifest["config"] |= {"method": "modiff" if quant.get("modulate") else "qdiff"}
            manifest["config"]["ptq"] = {"quant": {"weight_bits": 4, "act_bits": width, **quant}}
            if quant.get("modulate"):
                manifest["cost"] |= {"state_bytes": 1_900_416, "additions": 749_408, "first_bops": 9e9, "calls": 20}
            (folder / "run.json").write_text(json.dumps(manifest))

        monkeypatch.setattr(module, "_call", call)
        options = f"{QUANTIZED} --quant_act --act_bit"
        return [{"label": "float"}, *({"label": f"W4A{a}", "options": f"{options} {a}"} for a in WIDTHS)]

    return rows


@pytest.mark.slow
def test_modulated_rows_show_what_they_keep_and_add(table, quantized):
    rows = table.run(quantized(**MODULATED, ablation="no-compensation"))
    found = {key: rows["W4A4"][key] for key in ("method", "modulate", "ranges", "ablation", "act_bits")}
    assert found == {
        "method": "modiff", "modulate": True, "ranges": "sample", "ablation": "no-compensation", "act_bits": 4
    }  # fmt: skip
    plain = {key: rows["float"][key] for key in ("modulate", "ranges", "ablation", "state_bytes", "additions")}
    assert plain == {
        "modulate": False, "ranges": None, "ablation": None, "state_bytes": None, "additions": None
    }  # fmt: skip
    cells = table.cells("W4A4")
    assert (cells["state ↓"], cells["additions ↓"], cells["GBops ↓"]) == ("1.90 MB", "0.75 M", "2.5")
    assert table.cells("float")["state ↓"] == "–"
    for words in ("first step included", "keep from step to step, bytes per image", "add and subtract"):
        assert words in table.text()


@pytest.mark.slow
def test_without_modulation_there_is_no_word_of_it(table, quantized):
    table.run(quantized())
    for words in ("state", "additions", "first step"):
        assert words not in table.text()


@pytest.mark.slow
def test_three_activation_widths_make_a_picture(table, quantized):
    picture = table.out / "against-activation-bits.png"
    rows = quantized()
    table.run(rows[:3])
    assert not picture.exists()
    table.run(rows)
    with Image.open(picture) as image:
        assert image.width > 1000


# ---------------------------------------------------------------------- rows without their files


def released(table, name="released.pth") -> dict:
    return {"label": "released", "options": f"{QUANTIZED} --cali_ckpt {table.folder / name}"}


@pytest.mark.slow
def test_rows_without_their_checkpoint_are_left_out(table, capsys):
    rows = [{"label": "float"}, released(table), W4]
    assert list(table.run(rows)) == ["float", "W4"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 1
    for word in ("row released", str(table.folder / "released.pth"), "t.yaml"):
        assert word in lines[0]
    assert "released" in table.text().splitlines()[-1]  # among the rows not run
    (table.folder / "released.pth").touch()
    assert list(table.run(rows)) == ["float", "released", "W4"]
    assert "left out" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_that_was_named_must_have_its_checkpoint(table):
    with pytest.raises(UserError, match=r"row released needs the calibrated checkpoint .*released\.pth"):
        table.run([{"label": "float"}, released(table), W4], named="W4,released")
    assert table.commands == [] and not table.out.exists()
    assert list(table.run([{"label": "float"}, released(table), W4], named="W4")) == ["float", "W4"]


@pytest.mark.slow
def test_only_rows_that_calibrate_need_the_recording(table):
    calibration = {"script": "scripts/collect_calibration.py", "options": "--cali_n 3"}
    (table.folder / "released.pth").touch()
    rows = [{"label": "float"}, released(table)]
    table.run(rows, calibration=calibration)
    assert table.commands == [("sample", "float"), ("sample", "released")]
    table.run([*rows, W4], calibration=calibration)
    assert table.commands[-2:] == [("record", "calibration_data.pt"), ("sample", "w4")]


# ---------------------------------------------------------------------- what was asked for


@pytest.mark.slow
def test_conditional_rows_say_how_many_images_are_what_was_asked_for(table, digits):
    asked = digits[1]
    half = [digit if i % 2 else (digit + 1) % 10 for i, digit in enumerate(asked)]
    table.labels = {"right": asked, "half": half, "null": None}
    rows = table.run([{"label": label} for label in ("right", "half", "null", "absent")])
    assert rows["right"]["asked_share"] == 1.0 and rows["half"]["asked_share"] == 0.5
    assert "asked_share" not in rows["null"] and "asked_share" not in rows["absent"]
    assert table.cells("half")["asked ↑"] == "50.0 %" and table.cells("null")["asked ↑"] == "–"
    assert "asked images in which the classifier" in table.text()


@pytest.mark.slow
def test_unconditional_tables_have_no_such_column(table):
    table.labels = {"first": None}
    table.run([{"label": "first"}, {"label": "second"}])
    assert "asked" not in table.text().lower()


def test_extractor_without_class_names_measures_the_rest(table, digits, monkeypatch):
    spec = extractors.EXTRACTORS["digits-classifier"]
    nameless = extractors.ExtractorSpec(**{**vars(spec), "classes": None})
    monkeypatch.setitem(extractors.EXTRACTORS, "digits-classifier", nameless)
    table.labels = {"row": digits[1]}
    row = table.run([{"label": "row"}])["row"]
    assert "asked_share" not in row and row["isc"] > 1


@pytest.mark.slow
def test_reference_is_the_one_of_the_config_or_of_the_table(table):
    rows = [{"label": "row"}]
    fid = table.run(rows)["row"]["fid"]
    assert f"{COUNT} images" not in table.text() and "bicubic to 32×32 (1,797 images)" in table.text()
    # Another reference gives other numbers, in spite of the cached ones.
    other = table.run(rows, reference="digits")["row"]["fid"]
    assert abs(other - fid) > 1e-3
    config = yaml.safe_load(table.config.read_text())
    config["pretrained"]["reference"] = "digits"
    table.config.write_text(yaml.safe_dump(config))
    assert table.run(rows)["row"]["fid"] == other
    del config["pretrained"]["reference"]
    table.config.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="no reference statistics"):
        table.run(rows)
