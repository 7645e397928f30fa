"""The lines of scripts/gpu_check.py about the demo: a GPU's results next to the README's, which are from a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from qdiff.benchmark.gpu_check import Line
from qdiff.cli.script import Scripts
from qdiff.errors import UserError
from qdiff.io.repository import REPOSITORY
from qdiff.io.yaml_files import read_table

TABLE = REPOSITORY / "configs" / "tables" / "digits-demo.yaml"
README = REPOSITORY / "README.md"
# Relative tolerances. In float, another summation order changes no pixel by more than a grey level. In quantized rows,
# values on rounding boundaries flip, and rounding column by column then takes another course.
TOLERANCES = {"float": 0.03, "linear W4A8": 0.1, "GRIP W4A8": 0.2}
TITLES = {"fid": "FID", "noise_mse": "ε error"}  # in the README without arrows
SMALL = {
    "options": " --timesteps 4 --max_images 40 --batch_size 40",
    "calibration": " --cali_st 2 --cali_n 4",
}


def demo_lines(args: Namespace, scripts: Scripts) -> Iterator[Line]:
    """Run the demo's table on the device and compare it.

    Raises:
        UserError: the demo failed; its own message is in the log.
    """
    out = Path(args.out) / "demo"
    table = _small_table(Path(args.out)) if args.small else TABLE
    command = [sys.executable, str(REPOSITORY / "scripts" / "reproduce.py"), str(table)]
    done = subprocess.run([*command, "--out", str(out), "--device", args.device], cwd=REPOSITORY, check=False)
    if done.returncode:
        raise UserError(f"the demo failed with exit code {done.returncode}; its message is above")
    for row in json.loads((out / "table.json").read_text())["rows"]:
        yield compared(row, compare=not args.small)


def readme_numbers(label: str) -> dict[str, float]:
    """Return FID and the error of ε of a row of the README's table, which is from a CPU; "–" is left out.

    Raises:
        UserError: the README has no such row.
    """
    lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in README.read_text().splitlines()]
    titles: list[str] = []
    for cells in lines:
        if "FID ↓" in cells:
            titles = [title.rstrip(" ↓↑") for title in cells]
        if cells[0] == label and len(cells) == len(titles):
            found = dict(zip(titles, cells, strict=True))
            return {key: float(found[title]) for key, title in TITLES.items() if found[title] != "–"}
    raise UserError(f"{README} has no row '{label}' in a table with FID; 'make demo' prints it")


def compared(row: dict, compare: bool = True) -> Line:
    """Return the line for a row of the demo's results.

    Args:
        compare: compare the numbers with the README's.

    Raises:
        UserError: the README has no such row.
    """
    label = row["label"]
    wanted, tolerance = readme_numbers(label), TOLERANCES[label]
    found = {key: row[key] for key in wanted}
    times = {"calibration_s": row["calibration_s"], "sampling_s": row["sampling_s"]}
    text = ", ".join(f"{TITLES[key]} {value:.3g}" for key, value in found.items())
    text += f"; calibration {times['calibration_s']:.0f} s, sampling {times['sampling_s']:.0f} s"
    if not compare:
        return Line(label, text, values=found | times)
    good = all(abs(found[key] - value) <= tolerance * value for key, value in wanted.items())
    expected = ", ".join(f"{TITLES[key]} {value:.3g}" for key, value in wanted.items())
    return Line(label, text, f"{expected}, ±{100 * tolerance:.0f} %", good, values=found | times)


def _small_table(folder: Path) -> Path:
    spec = read_table(TABLE)
    spec["options"] += SMALL["options"]
    spec["calibration"]["options"] += SMALL["calibration"]
    path = folder / "small-demo.yaml"
    path.write_text(json.dumps(spec))  # JSON is YAML
    return path
