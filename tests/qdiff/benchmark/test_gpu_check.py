"""The check of a GPU: parts that fail, hang or lack a package are lines of one table."""

from __future__ import annotations

import json
import re
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest

from qdiff.benchmark import gpu_check, gpu_demo, gpu_tests
from qdiff.benchmark.gpu_check import Line, Part, Result, missing_packages, run_check, run_part, table
from qdiff.benchmark.gpu_networks import QUANT
from qdiff.errors import UserError
from qdiff.io.yaml_files import read_table


@pytest.fixture
def asked(tmp_path):
    return Namespace(out=str(tmp_path / "out"), device="cpu", small=True, parts=None, part=None)


@pytest.fixture
def parts(monkeypatch):
    """``parts(name=Part, …)``: these are all."""

    def only(**made):
        monkeypatch.setattr(gpu_check, "PARTS", made)

    return only


@pytest.mark.slow
def test_a_real_part_in_a_process_of_its_own(asked, capsys):
    asked.parts = "machine"
    assert run_check(asked)
    out = Path(asked.out)
    text = capsys.readouterr().out
    assert "| machine | TF32 | products " in text and (out / "table.md").read_text() == text
    (result,) = json.loads((out / "table.json").read_text())["parts"]
    assert result["name"] == "machine" and result["seconds"] > 0 and result["lines"][-1]["values"]["matmul"] is False


def test_a_part_that_breaks_and_one_that_hangs(asked, parts, capsys, monkeypatch):
    # The processes know the real parts alone, so that a name of others is what breaks there.
    monkeypatch.setattr(gpu_check, "CPU_PATIENCE", 1.0)
    parts(unknown=Part("broken", 60, "x:y"), machine=Part("slow", 0.2, "x:y"))
    assert not run_check(asked)
    out = capsys.readouterr().out
    assert re.search(r"\| broken \|  \| exit code 1: KeyError: 'unknown'.*unknown.log.*\*\*failed\*\* \|", out)
    assert "| slow |  | stopped after 0 s |  | **failed** |" in out


def test_missing_packages_are_named_once_with_what_is_skipped(asked, parts, capsys):
    parts(one=Part("first", 1, "x:y", ("no_such_package",)), two=Part("second", 1, "x:y", ("no_such_package", "json")))
    (sentence,) = missing_packages(["one", "two"])
    assert sentence.startswith("no_such_package is not installed, so these parts are skipped: first, second;")
    assert run_check(asked)  # what is skipped is no failure
    assert capsys.readouterr().out.count("skipped without no_such_package") == 2


def test_lines_are_kept_as_they_come(asked, parts, monkeypatch):
    def lines(args, scripts):
        assert scripts == {"a": 1}
        yield Line("first", "1")
        raise RuntimeError("in the middle")

    monkeypatch.setitem(sys.modules, "made_up", types.SimpleNamespace(lines=lines))
    parts(one=Part("one", 1, "made_up:lines"))
    Path(asked.out).mkdir()
    with pytest.raises(RuntimeError):
        run_part("one", asked, {"a": 1})
    (kept,) = gpu_check._read_lines(Path(asked.out) / "one.jsonl")
    assert kept == Line("first", "1")


def test_table(parts):
    parts(a=Part("A", 1, ""))
    lines = [Line("x", "1|2", "1", False), Line("y", "3", "3", True), Line("z", "4")]
    rows = table([Result("a", lines, trouble="stopped after 1 s")]).splitlines()[2:]
    assert rows == [
        "| A | x | 1/2 | 1 | **differs** |",
        "| A | y | 3 | 3 | as expected |",
        "| A | z | 4 |  |  |",
        "| A |  | stopped after 1 s |  | **failed** |",
    ]


def test_unknown_parts(asked):
    asked.parts = "machine,abacus"
    with pytest.raises(UserError, match="'abacus'; choose from machine"):
        run_check(asked)


def test_all_fits_into_eight_minutes_and_every_part_is_there():
    assert sum(part.seconds for part in gpu_check.PARTS.values()) <= gpu_check.AT_MOST < 480
    assert "--split" in QUANT
    for part in gpu_check.PARTS.values():
        module, function = part.function.split(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_counts_of_pytest():
    assert gpu_tests.counted("..F\n1 failed, 2 passed, 3 skipped in 1.2s") == {"passed": 2, "failed": 1, "skipped": 3}
    assert gpu_tests.counted("2 errors in 0.1s\n") == {"error": 2}
    assert gpu_tests.counted("nothing") == {}


@pytest.mark.parametrize("label", gpu_demo.TOLERANCES)
def test_demo_is_compared_with_the_readme(label):
    wanted = gpu_demo.readme_numbers(label)
    assert wanted.keys() == ({"fid"} if label == "float" else {"fid", "noise_mse"})
    result = {"label": label, "noise_mse": 0.0, "calibration_s": 1.0, "sampling_s": 1.0, **wanted}
    assert gpu_demo.compared(result).good is True
    for key, value in wanted.items():  # planted: beyond the tolerance
        assert gpu_demo.compared(result | {key: value * (1.01 + gpu_demo.TOLERANCES[label])}).good is False
    assert gpu_demo.compared(result, compare=False).good is None


def test_numbers_of_the_readme(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(
        "| A | a sentence |\n\n|  | FID ↓ | IS ↑ | ε error ↓ |\n| --- | --- | --- | --- |\n"
        "| float | 0.78 | 8.32 ± 0.38 | – |\n| A | 0.79 | 8.33 ± 0.43 | 1.31e-04 |\n"
    )
    monkeypatch.setattr(gpu_demo, "README", readme)
    assert gpu_demo.readme_numbers("float") == {"fid": 0.78}
    assert gpu_demo.readme_numbers("A") == {"fid": 0.79, "noise_mse": 1.31e-4}
    with pytest.raises(UserError, match=r"README.md has no row 'B'"):
        gpu_demo.readme_numbers("B")


def test_rows_of_the_demo_have_tolerances():
    assert [row["label"] for row in read_table(gpu_demo.TABLE)["rows"]] == list(gpu_demo.TOLERANCES)
