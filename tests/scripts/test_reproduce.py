"""The table command on a tiny model: sampling runs in this process, and the metrics are stand-ins."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from thorough import thorough_except

REPOSITORY = Path(__file__).parents[2]
ROWS = [
    {"label": "float", "options": None},  # `options:` with nothing behind it
    {"label": "linear W4A8", "options": "--ptq --quant_mode linear --weight_bit 4 --quant_act --split"},
    {"label": "Q-Diffusion W4", "options": "--ptq --weight_bit 4 --split --cali_iters 2"},
    {
        "label": "Q-Diffusion W4A8",
        "options": "--ptq --weight_bit 4 --quant_act --split --cali_iters 2 --cali_iters_a 2",
        "weights_from": "Q-Diffusion W4",
    },
]
FOLDERS = ["float", "linear-w4a8", "q-diffusion-w4", "q-diffusion-w4a8"]
SUMMARY = {"table.md", "table.json", "table.html", "comparison.png"}


@pytest.fixture
def table(one_level, tmp_path):
    """``table(**changes)`` writes a table file and returns its path."""
    config = tmp_path / "tiny.yml"
    config.write_text(
        one_level.config.read_text() + "pretrained: {file: x, extractor: stand-in, reference: stand-in.npz}\n"
    )
    spec = {
        "title": "Tiny",
        "config": str(config),
        "script": "scripts/sample_diffusion_ddim.py",
        "options": f"--config {config} --ckpt {one_level.weights} --timesteps 2 --max_images 3 --batch_size 2",
        "calibration": {"script": "scripts/collect_calibration.py", "options": "--cali_st 2 --cali_n 3"},
        "rows": ROWS,
    }

    def write(**changes) -> Path:
        path = tmp_path / "table.yaml"
        values = {k: v for k, v in {**spec, **changes}.items() if v is not ...}
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def stood_in(call, monkeypatch, without_plots):
    """Replaces subprocesses by calls and metrics by numbers; returns the commands and the measured folders."""
    from qdiff.cli import measure, table
    from qdiff.errors import UserError
    from qdiff.evaluation.registry import METRICS

    commands, measured = [], []

    def in_process(command):
        script, *words = command
        assert (REPOSITORY / script).is_file()
        commands.append((Path(script).stem, words))
        outcome = call(Path(script).stem, *words)
        if outcome.code:
            raise UserError(outcome.err)

    def mean(folder):
        return float(np.mean([np.asarray(Image.open(p)) for p in sorted(Path(folder).glob("*.png"))]))

    def of_subject(subject, names):
        folder = subject.images.folder
        if "fid" in names:
            measured.append(folder.parent.name)
        values = {"fid": mean(folder), "isc": 2.0, "isc_std": 0.5, "kid": 0.125, "kid_std": 0.0, "sfid": 7.0}
        found = {"num_images": 3} | {k: v for k, v in values.items() if k.removesuffix("_std") in names}
        return found | (fidelity(folder, subject.float_images.folder) if "fidelity" in names else {})

    def fidelity(ours, theirs):  # these images are too small for SSIM
        assert theirs.parent.name == "float" != ours.parent.name
        return {"psnr": 50 - abs(mean(ours) - mean(theirs)), "ssim": 0.5, "identical": 0}

    monkeypatch.setattr(table, "_call", in_process)
    monkeypatch.setattr(measure, "create_extractor", lambda name, weights, device: name)
    monkeypatch.setattr(measure, "weights_hash", lambda extractor: "w")
    whole = dict.fromkeys(("gaussian", "spatial", "features"), True)
    statistics = SimpleNamespace(weights_hash="w", images_hash="i", name="stand-in", count=9, **whole)
    monkeypatch.setattr(measure, "find_reference", lambda name, extractor: statistics)
    monkeypatch.setattr(measure, "implied_metrics", list)
    # Three images are too few for the inception score of ten parts.
    monkeypatch.setitem(METRICS, "isc", dataclasses.replace(METRICS["isc"], least_images=1))
    monkeypatch.setattr(measure, "measure", of_subject)
    return commands, measured


@pytest.mark.slow
def test_table_from_runs(call, table, stood_in, tmp_path):
    commands, measured = stood_in
    out = tmp_path / "out"
    outcome = call("reproduce", table(), "--out", out, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    samples, records = "sample_diffusion_ddim", "collect_calibration"
    assert [name for name, _ in commands] == [samples, records, samples, samples, samples]
    assert measured == FOLDERS
    assert {p.name for p in out.iterdir()} == {*FOLDERS, *SUMMARY, "calibration_data.pt"}

    # One recording for all; it is not told the number of images.
    assert "--max_images" not in commands[1][1] and commands[1][1][-1] == str(out / "calibration_data.pt")
    for _, words in commands[2:]:
        assert words[words.index("--cali_data_path") + 1] == str(out / "calibration_data.pt")
    assert "--cali_data_path" not in commands[0][1]
    for label, folder in zip(FOLDERS[1:], (out / f for f in FOLDERS[1:]), strict=True):
        run = json.loads((folder / "run.json").read_text())
        assert run["files"]["calibration data"]["path"] == str(out / "calibration_data.pt"), label
        assert not (folder / "calibration_data.pt").exists()

    # The last row starts from the third row's weights.
    last = json.loads((out / FOLDERS[3] / "run.json").read_text())
    assert last["config"]["ptq"]["action"] == "activations"
    assert last["files"]["quantized checkpoint"]["path"] == str(out / FOLDERS[2] / "quantized.safetensors")

    rows = json.loads((out / "table.json").read_text())["rows"]
    assert [row["label"] for row in rows] == [row["label"] for row in ROWS]
    assert rows[0]["noise_mse"] is None and all(row["noise_mse"] > 0 for row in rows[1:])
    assert rows[0]["calibration_s"] == 0
    both = [json.loads((out / f / "run.json").read_text())["seconds"]["calibration"] for f in FOLDERS[2:]]
    assert rows[3]["calibration_s"] == pytest.approx(sum(both))  # the time of the weights counts too
    assert rows[2]["bytes"] == (out / FOLDERS[2] / "quantized.safetensors").stat().st_size < rows[0]["bytes"]

    text = (out / "table.md").read_text()
    assert text.startswith("# Tiny\n") and text in outcome.out
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(ROWS)
    assert lines[2].startswith(f"| float | {rows[0]['fid']:.2f} | 7.00 | 2.00 ± 0.50 | 0.1250 | – | – |")
    assert "images per row 3; seed 1234;" in text
    assert "psnr" not in rows[0] and all(row["psnr"] < 50 for row in rows[1:])

    # Size and bit operations are counted: 4 bits of 32, and 4·32 and 4·8 of 32·32 for most layers.
    size, bops = ([row[key] / rows[0][key] for row in rows] for key in ("counted_bytes", "gbops"))
    assert size[0] == bops[0] == 1 and 0.12 < size[2] < 0.3 and size[1] == pytest.approx(size[3], rel=0.05)
    assert 0.12 < bops[2] < 0.2 and 0.03 < bops[1] < 0.08 and bops[1] == pytest.approx(bops[3], rel=1e-9)
    for row, folder in zip(rows, FOLDERS, strict=True):
        assert row["counted_bytes"] == json.loads((out / folder / "run.json").read_text())["cost"]["size_bytes"]

    with Image.open(out / "comparison.png") as picture:
        assert picture.size[0] > 4 * 300
    page = (out / "table.html").read_text()
    assert_self_contained(page)
    assert "<title>Tiny" in page and all(row["label"] in page for row in ROWS)
    assert page.count("data:image/png;base64,") >= len(ROWS)


def assert_self_contained(page: str) -> None:
    """Nothing is fetched: every source is data or a place in the page."""
    sources = re.findall(r"""(?:src|href|srcset|poster|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert sources and [s for s in sources if not s.startswith(("data:", "#"))] == []
    assert not re.search(r"@import|url\((?!#|data:)|<(?:iframe|object|embed)|fetch\(|XMLHttpRequest", page)


@pytest.mark.slow
def test_repeated_table_measures_only_what_changed(call, table, stood_in, tmp_path):
    commands, measured = stood_in
    path, out = table(rows=ROWS[:2]), tmp_path / "out"
    assert call("reproduce", path, "--out", out, "--device", "cpu").code == 0
    first = json.loads((out / "table.json").read_text())
    commands.clear(), measured.clear()
    assert call("reproduce", path, "--out", out, "--device", "cpu").code == 0
    assert measured == [] and "collect_calibration" not in [name for name, _ in commands]
    assert json.loads((out / "table.json").read_text()) == first
    (out / "float" / "img" / "00001.png").unlink()
    assert call("reproduce", path, "--out", out, "--device", "cpu").code == 0
    assert measured == ["float"]


def test_dry_run_prints_commands_and_writes_nothing(call, table, tmp_path):
    path = table()
    before = sorted(tmp_path.iterdir())
    outcome = call("reproduce", path, "--out", tmp_path / "out", "--device", "cpu", "--dry-run")
    assert outcome.code == 0 and outcome.err == "" and sorted(tmp_path.iterdir()) == before
    shown = json.loads(outcome.out)
    assert shown["extractor"] == "stand-in" and list(shown["commands"]) == [row["label"] for row in ROWS]
    assert f"--resume_w --cali_ckpt {tmp_path / 'out' / FOLDERS[2]}" in shown["commands"]["Q-Diffusion W4A8"]
    assert "--device cpu" in shown["commands"]["float"]
    other = call("reproduce", path, "--extractor", "inception-v3-compat", "--dry-run")
    assert json.loads(other.out)["extractor"] == "inception-v3-compat"


def resolves(call, command: str) -> bool:
    """Whether a printed command is accepted by its script."""
    python, script, *words = shlex.split(command)
    assert python == "python"
    return call(Path(script).stem, *words, "--dry-run").code == 0


def test_commands_of_the_dry_run_resolve(call, table, tmp_path):
    shown = json.loads(call("reproduce", table(), "--out", tmp_path / "out", "--dry-run").out)
    for command in shown["commands"].values():
        assert resolves(call, command)


@pytest.mark.thorough
def test_named_rows_alone_are_run_and_all_finished_ones_shown(call, table, stood_in, tmp_path):
    commands, measured = stood_in
    path, out = table(), tmp_path / "out"

    def run(rows: str) -> list[str]:
        commands.clear(), measured.clear()
        assert call("reproduce", path, "--out", out, "--device", "cpu", "--rows", rows).code == 0
        return [row["label"] for row in json.loads((out / "table.json").read_text())["rows"]]

    # Float, which others are judged by, is added where it is not finished.
    assert run("linear W4A8") == ["float", "linear W4A8"]
    assert [name for name, _ in commands] == ["sample_diffusion_ddim", "collect_calibration", "sample_diffusion_ddim"]
    missing = "table's present options: Q-Diffusion W4, Q-Diffusion W4A8."
    assert (out / "table.md").read_text().splitlines()[-1].endswith(missing)
    assert run("float") == ["float", "linear W4A8"]
    assert [name for name, _ in commands] == ["sample_diffusion_ddim"] and measured == []
    # The table's order is kept whatever the order of naming.
    assert run("Q-Diffusion W4A8, Q-Diffusion W4") == [row["label"] for row in ROWS]
    assert [words[words.index("-l") + 1] for _, words in commands] == [str(out / f) for f in FOLDERS[2:]]
    assert "not yet run" not in (out / "table.md").read_text()


@pytest.mark.slow
def test_only_finished_rows_of_the_present_options_are_shown(call, table, stood_in, tmp_path):
    commands, _ = stood_in
    out = tmp_path / "out"

    def run(label: str, rows: list) -> list[str]:
        outcome = call("reproduce", table(rows=rows), "--out", out, "--rows", label)
        assert outcome.code == 0, outcome.err
        return [row["label"] for row in json.loads((out / "table.json").read_text())["rows"]]

    assert run("float", ROWS[:2]) == ["float"]
    assert [name for name, _ in commands] == ["sample_diffusion_ddim"]  # float needs no recording
    assert run("float,linear W4A8", ROWS[:2]) == ["float", "linear W4A8"]
    changed = {"label": "linear W4A8", "options": "--ptq --quant_mode linear --weight_bit 3"}
    assert run("float", [ROWS[0], changed]) == ["float"]
    assert "with the table's present options: linear W4A8." in (out / "table.md").read_text()
    assert run("float", ROWS[:2]) == ["float", "linear W4A8"]
    (out / "linear-w4a8" / "img" / "00001.png").unlink()
    assert run("float", ROWS[:2]) == ["float"]


def test_rows_that_cannot_be_run_are_one_sentence(call, table, stood_in, tmp_path):
    commands, _ = stood_in
    words = ["reproduce", table(), "--out", tmp_path / "out", "--rows"]
    line = call(*words, "float,linear W4").error_line()
    assert "no row 'linear W4'" in line and "float, linear W4A8, Q-Diffusion W4" in line
    assert "no row ''" in call(*words, "").error_line()
    line = call(*words, "Q-Diffusion W4A8").error_line()
    assert "takes weights from row Q-Diffusion W4, which is not finished" in line
    assert commands == [] and not (tmp_path / "out").exists()


def test_dry_run_of_named_rows(call, table):
    rows = [{"label": "float, 20 steps"}, *ROWS[1:]]
    shown = json.loads(call("reproduce", table(rows=rows), "--dry-run", "--rows", "float, 20 steps").out)
    assert list(shown["commands"]) == ["float, 20 steps"]  # a label with a comma, named alone


COMMON = ("--eta 0.5 --dpm_order 3 --max_images 4", "--eta=0.5 --dpm_order=3 --max_images=4")


@pytest.mark.slow
@pytest.mark.parametrize("common", thorough_except(COMMON, COMMON[1]))
def test_recording_skips_the_options_it_does_not_know(common, call, table, stood_in, tmp_path):
    commands, _ = stood_in
    calibration = {
        "script": "scripts/collect_calibration.py",
        "options": "--cali_st 2 --cali_n 2",
        "skip": ["--eta", "--max_images"],
    }
    base = yaml.safe_load(table().read_text())["options"].replace("--max_images 3", common)
    path = table(options=base, calibration=calibration, rows=ROWS[:2])
    outcome = call("reproduce", path, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    _, recording = commands[1]
    assert not any(skipped in word for word in recording for skipped in ("--eta", "0.5", "--max_images"))
    assert any(word.startswith("--dpm_order") for word in recording) and "4" not in recording
    for known in ("--timesteps", "--batch_size"):  # before and behind
        assert recording[recording.index(known) + 1] == "2"
    assert all(shlex.split(common)[0] in commands[row][1] for row in (0, 2))  # rows keep them


def test_document_gets_the_table(call, table, stood_in, tmp_path):
    commands, _ = stood_in
    file, out = tmp_path / "results.md", tmp_path / "out"
    words = ["reproduce", table(rows=ROWS[:1]), "--out", out, "--document", file]
    for text in ("", "<!-- table table -->", "<!-- table other -->\n<!-- end of table other -->"):
        file.write_text(text)
        line = call(*words).error_line()
        assert "<!-- table table -->" in line and "<!-- end of table table -->" in line
        assert commands == [] and not out.exists() and file.read_text() == text
    file.write_text("Before.\n<!-- table table -->\nold\n<!-- end of table table -->\nBehind.\n")
    assert call(*words).code == 0
    text = (out / "table.md").read_text().removeprefix("# Tiny\n\n").strip()
    assert file.read_text() == f"Before.\n<!-- table table -->\n{text}\n<!-- end of table table -->\nBehind.\n"


def test_failing_row_stops_the_table(call, table, stood_in, tmp_path):
    path = table(rows=[ROWS[0], {"label": "bad", "options": "--ptq --weight_bit 99"}])
    outcome = call("reproduce", path, "--out", tmp_path / "out", "--device", "cpu")
    assert outcome.code == 2 and "from 1 to 8" in outcome.err and "Traceback" not in outcome.err
    assert not SUMMARY & {p.name for p in (tmp_path / "out").iterdir()}


def test_failed_subprocess_is_one_sentence_with_its_command(tmp_path):
    from qdiff.cli.table import _call
    from qdiff.errors import UserError

    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(int(sys.argv[1]))")
    _call([str(script), "0"])
    with pytest.raises(UserError, match=rf"exit code 3 .*python {script} 3"):
        _call([str(script), "3"])
    with pytest.raises(KeyboardInterrupt):
        _call([str(script), "130"])


@pytest.mark.slow
def test_a_table_of_a_pipeline(table, stood_in, call, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    network = diffusers.UNet2DModel(8, 1, 1, norm_num_groups=4, layers_per_block=1, **blocks)
    diffusers.DDIMPipeline(network, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    options = f"{tmp_path / 'pipeline'} --steps 2 --n_samples 3 --batch_size 2"
    rows = [ROWS[0], {"label": "linear W4A8", "options": "--ptq --quant_mode linear --weight_bit 4 --quant_act"}]
    path = table(script="scripts/sample_pipeline.py", options=options, rows=rows)
    outcome = call("reproduce", path, "--out", tmp_path / "table")
    assert outcome.code == 0, outcome.err
    text = (tmp_path / "table" / "table.md").read_text()
    assert "| linear W4A8 |" in text and "sampler kind DDIMScheduler, steps 2" in text


def test_published_numbers_are_written_without_a_run(table, call, tmp_path):
    document = tmp_path / "papers.md"
    document.write_text("<!-- table table -->\n<!-- end of table table -->\n")
    rows = [{"label": "float", "published": {"fid": 4.22}}]
    done = call("reproduce", table(rows=rows, source="A paper"), "--published", "--document", document)
    assert done.code == 0 and "| float | 4.22 | not run |" in done.out
    assert document.read_text() == f"<!-- table table -->\n{done.out.strip()}\n<!-- end of table table -->\n"
    assert not (tmp_path / "runs").exists() and not (REPOSITORY / "runs" / "table").exists()
    for words, says in (((), "has no published numbers"), (("--rows", "float"), "leave --rows out")):
        refused = call("reproduce", table(), "--published", *words)
        assert refused.code == 2 and says in refused.err
