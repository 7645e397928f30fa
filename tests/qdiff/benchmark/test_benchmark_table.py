"""A benchmark's rows as a table, and the line under it."""

from __future__ import annotations

import json

import pytest

from qdiff.benchmark.machine import describe_machine, machine_text
from qdiff.benchmark.run import command_line, widths
from qdiff.benchmark.table import VariantRow, markdown, write_json
from qdiff.benchmark.timing import Spread
from qdiff.config import QuantConfig

MACHINE = {
    "cpu": "A CPU", "flags": ["avx2"], "cores": 4, "usable_cores": 4, "memory_bytes": 2**33, "threads": 2, "load": 0.1,
    "packages": {"torch": "2", "openvino": None},
}  # fmt: skip
ABOUT = {
    "model": "tiny", "quant": "W8A8", "measure": "sampling", "batch": 8, "calls": 20, "repeats": 3, "date": "today",
    "machine": MACHINE, "command": "python scripts/benchmark.py --batch 8",
}  # fmt: skip
FLOAT = VariantRow("float", Spread(3.9, 4.0, 4.2), 20, 2.0, Spread(1, 1, 1), None, 1_000_000, 2_400_000, 9, 142_990_000)
INTEGERS = VariantRow(
    "openvino", Spread(0.1, 0.2, 0.31), 20, 40.0, Spread(18, 20.5, 21), Spread(2, 3, 4), 5_000_000, 6_000_000, 9, 36_754
)
BROKEN = VariantRow("float-compile", note="no compiler | here")


def cells(line: str) -> list[str]:
    return line.removeprefix("| ").removesuffix(" |").split(" | ")


def test_of_sampling():
    lines = markdown([FLOAT, BROKEN, INTEGERS], ABOUT).splitlines()
    assert cells(lines[0]) == [
        "variant", "time per batch ↓", "time per call ↓", "images/s ↑", "× float ↑", "× own float ↑", "memory kept ↓",
        "memory peak ↓", "file ↓",
    ]  # fmt: skip
    assert lines[1].count("---") == 9
    assert cells(lines[2]) == [
        "float", "4 (3.9–4.2) s", "200 ms", "2", "1.00", "–", "1 MB", "2 MB", "142.99 MB",
    ]  # fmt: skip
    assert cells(lines[3]) == ["float-compile", "not measured: no compiler / here", *"–" * 7]
    assert cells(lines[4]) == [
        "openvino", "200 (100–310) ms", "10 ms", "40", "20.50 (18.00–21.00)", "3.00 (2.00–4.00)", "5 MB", "6 MB",
        "0.04 MB",
    ]  # fmt: skip
    assert lines[5] == "" and len(lines) == 7
    assert lines[6].startswith(
        "tiny, W8A8; batch 8, whole samplings of 20 network calls without decoding; medians of 3 turns"
    )
    assert "A CPU (avx2), 4 cores, 8 GiB, 2 thread(s), load 0.1 before; torch 2; today" in lines[6]
    assert lines[6].endswith(": `python scripts/benchmark.py --batch 8`")


def test_of_calls_says_nothing_of_images():
    text = markdown([VariantRow("float", Spread(0.1, 0.2, 0.3), 1)], {**ABOUT, "measure": "call"})
    assert "per batch" not in text and "images" not in text and "sampling" not in text
    assert cells(text.splitlines()[2])[:2] == ["float", "200 (100–300) ms"]


def test_without_turns_there_are_no_times():
    lines = markdown([FLOAT, BROKEN], {**ABOUT, "repeats": 0}).splitlines()
    assert cells(lines[0]) == ["variant", "memory kept ↓", "memory peak ↓", "file ↓"]
    assert cells(lines[2]) == ["float", "1 MB", "2 MB", "142.99 MB"]
    assert cells(lines[3]) == ["float-compile", "not measured: no compiler / here", "–", "–"]
    assert "turns" not in lines[-1]


def test_one_turn_has_no_spread():
    lines = markdown(
        [VariantRow("float", Spread.of([0.2]), 1, ratio=Spread.of([1.25]))], {**ABOUT, "repeats": 1}
    ).splitlines()
    assert cells(lines[2])[1:5] == ["200 ms", "200 ms", "–", "1.25"]
    assert "; one turn each; " in lines[-1] and "medians" not in lines[-1]


def test_large_numbers_are_written_out():
    row = VariantRow("float", Spread(1234.5, 2000, 2500.2), 1)
    assert cells(markdown([row], ABOUT).splitlines()[2])[1:3] == ["2000 (1234–2500) s", "2000000 ms"]
    row = VariantRow("float", Spread(0.9996, 0.9997, 0.9998), 1)  # no 1e+03
    assert cells(markdown([row], ABOUT).splitlines()[2])[1:3] == ["1000 (1000–1000) ms", "1000 ms"]


def test_json_holds_every_number(tmp_path):
    write_json(tmp_path / "out.json", [INTEGERS, BROKEN], ABOUT)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["batch"] == 8 and found["machine"] == MACHINE
    first, second = found["rows"]
    assert first["seconds"] == {"low": 0.1, "middle": 0.2, "high": 0.31} and first["own_ratio"]["middle"] == 3
    assert (first["kept"], first["peak"], first["imports"], first["file_bytes"]) == (5_000_000, 6_000_000, 9, 36_754)
    assert second["note"] == "no compiler | here" and second["seconds"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch", "8", "--out", "a.json", "--prompt", "a b"],
        ["--out=a.json", "--batch", "8", "--prompt", "a b", "--document", "x.md", "--table", "t"],
        ["--table=t", "--batch", "8", "--document=x.md", "--prompt", "a b", "--out"],
    ],
)
def test_the_command_without_where_its_table_goes(arguments):
    assert command_line(arguments) == "python scripts/benchmark.py --batch 8 --prompt 'a b'"


def test_widths():
    assert widths(QuantConfig(4)) == "W4A32"
    config = QuantConfig(8, 8, split_shortcut=True, weight_symmetric=True, act_dynamic=True, modulate=True)
    assert widths(config) == "W8A8 split w_sym dynamic modulated"


def test_this_machine():
    found = describe_machine(3)
    assert found["threads"] == 3 and found["packages"]["torch"] and found["memory_bytes"] > 2**28
    assert 1 <= found["usable_cores"] <= found["cores"]
    assert f"{found['cores']} cores" in machine_text(found) and "may be used" not in machine_text(MACHINE)
    assert "4 cores, of which 1 may be used" in machine_text({**MACHINE, "usable_cores": 1})
