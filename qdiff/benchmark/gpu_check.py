"""The parts of scripts/gpu_check.py, each in its own process with its own time limit, and their table."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdiff.cli.script import Scripts
from qdiff.errors import UserError
from qdiff.io.files import check_writable, written_whole
from qdiff.io.markdown import markdown_table
from qdiff.io.repository import REPOSITORY

PACKAGES = REPOSITORY / ".gpu-packages"
"""Pure-Python packages prepared with ``make gpu-packages``, for a machine that cannot install packages."""
AT_MOST = 470.0
"""Time limit of all parts together on a GPU, in seconds."""
CPU_PATIENCE = 6.0
"""Factor on all time limits for a trial on the CPU."""


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        what: what was checked.
        found: the result as text.
        wanted: the expected result as text; "" if there is none.
        good: whether the result is as expected; None if nothing is compared.
        values: the numbers in ``found``.
    """

    what: str
    found: str
    wanted: str = ""
    good: bool | None = None
    values: dict[str, Any] | None = None


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        title: title in the table.
        seconds: time limit.
        function: ``module:name`` of ``function(args, scripts) → lines``, run in the part's own process.
        needs: required packages, by the names under which they are imported.
    """

    title: str
    seconds: float
    function: str
    needs: tuple[str, ...] = ()


_SCRIPTS = ("omegaconf", "psutil", "safetensors", "yaml", "tqdm")
_EVALUATION = (*_SCRIPTS, "torch_fidelity", "jinja2", "sklearn")
PARTS: dict[str, Part] = {
    "machine": Part("machine", 30, "qdiff.benchmark.gpu_machine:machine_lines"),
    "gpu-tests": Part(
        "tests marked gpu", 60, "qdiff.benchmark.gpu_tests:marked_tests", ("psutil", "pytest", "torch_fidelity")
    ),
    "script-tests": Part("script tests", 80, "qdiff.benchmark.gpu_tests:script_tests", ("pytest", *_SCRIPTS)),
    "demo": Part("demo", 150, "qdiff.benchmark.gpu_demo:demo_lines", _EVALUATION),
    "cifar10": Part("CIFAR-10 UNet", 60, "qdiff.benchmark.gpu_networks:cifar10_lines", _SCRIPTS),
    "stable-diffusion": Part(
        "Stable Diffusion UNet", 90, "qdiff.benchmark.gpu_networks:stable_diffusion_lines", (*_SCRIPTS, "transformers")
    ),
}


@dataclass
class Result:
    """The outcome of a part.

    Attributes:
        lines: the lines that it completed.
        seconds: the time that it took.
        trouble: why it ended early or did not start; "" if it finished.
        skipped: it did not start.
    """

    name: str
    lines: list[Line]
    seconds: float = 0.0
    trouble: str = ""
    skipped: bool = False


def run_check(args: Namespace) -> bool:
    """Run the parts, print the table and write it; return whether everything is as expected.

    Raises:
        UserError: a part is unknown, or the folder cannot be written.
    """
    names = _chosen(args.parts)
    out = Path(args.out)
    check_writable(out / "table.md")
    sys.path.append(str(PACKAGES))
    for sentence in missing_packages(names):
        print(sentence, file=sys.stderr, flush=True)
    results: list[Result] = []
    patience = CPU_PATIENCE if args.device == "cpu" else 1.0
    deadline = time.monotonic() + patience * AT_MOST
    for name in names:
        lacking = _lacking(PARTS[name])
        if lacking:
            results.append(Result(name, [], trouble=f"skipped without {' and '.join(lacking)}", skipped=True))
            continue
        print(f"{PARTS[name].title} …", file=sys.stderr, flush=True)
        results.append(_run(name, args, out, min(patience * PARTS[name].seconds, deadline - time.monotonic())))
        _write(results, args, out)  # after every part, so that an interruption keeps the finished ones
    _write(results, args, out)
    print(table(results))
    return not any((r.trouble and not r.skipped) or any(line.good is False for line in r.lines) for r in results)


def run_part(name: str, args: Namespace, scripts: Scripts) -> None:
    """In the process of a part: write its lines to the part's file, each as soon as it is available."""
    module, function = PARTS[name].function.split(":")
    with _lines_file(Path(args.out), name).open("w") as file:
        for line in getattr(importlib.import_module(module), function)(args, scripts):
            file.write(json.dumps(asdict(line)) + "\n")
            file.flush()


def missing_packages(names: Sequence[str]) -> list[str]:
    """Return a sentence for every package that parts need and that is missing."""
    without: dict[str, list[str]] = {}
    for name in names:
        for package in _lacking(PARTS[name]):
            without.setdefault(package, []).append(PARTS[name].title)
    advice = "prepare it with make gpu-packages on a machine with a network"
    return [f"{package} is not installed, so these parts are skipped: {', '.join(titles)}; {advice}"
            for package, titles in without.items()]  # fmt: skip


def table(results: Sequence[Result]) -> str:
    """Return the markdown table."""
    lines = []
    for result in results:
        title = PARTS[result.name].title
        verdicts = {True: "as expected", False: "**differs**", None: ""}
        for line in result.lines:
            lines.append([title, line.what, line.found, line.wanted, verdicts[line.good]])
        if result.trouble:
            verdict = "" if result.skipped else "**failed**"
            lines.append([title, "", result.trouble, "", verdict])
    return markdown_table(lines, ["part", "what", "result", "expected", ""])


def _chosen(text: str | None) -> list[str]:
    names = list(PARTS) if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in PARTS:
            raise UserError(f"--parts has {name!r}; choose from {', '.join(PARTS)}")
    return names


def _lacking(part: Part) -> list[str]:
    return [package for package in part.needs if importlib.util.find_spec(package) is None]


def _lines_file(out: Path, name: str) -> Path:
    return out / f"{name}.jsonl"


def environment() -> dict[str, str]:
    """Return the environment of a part: it imports this repository, and prepared packages that are not installed."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")]), str(PACKAGES)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _run(name: str, args: Namespace, out: Path, seconds: float) -> Result:
    out.mkdir(parents=True, exist_ok=True)
    _lines_file(out, name).unlink(missing_ok=True)
    command = [sys.executable, str(REPOSITORY / "scripts" / "gpu_check.py"), "--part", name, "--out", str(out)]
    command += ["--device", args.device, *(["--small"] if args.small else [])]
    log, started = out / f"{name}.log", time.monotonic()
    trouble = ""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            trouble = f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # kill the part's own processes, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not trouble and code:
        words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        trouble = f"exit code {code}: {words[-1][:200] if words else 'no message'} ({log.name})"
    return Result(name, list(_read_lines(_lines_file(out, name))), round(time.monotonic() - started, 1), trouble)


def _read_lines(path: Path) -> Iterator[Line]:
    if path.is_file():
        for text in path.read_text().splitlines():
            yield Line(**json.loads(text))


def _write(results: Sequence[Result], args: Namespace, out: Path) -> None:
    about = {"device": args.device, "small": args.small, "date": time.strftime("%Y-%m-%d")}
    with written_whole(out / "table.md") as path:
        path.write_text(table(results) + "\n")
    with written_whole(out / "table.json") as path:
        path.write_text(json.dumps({**about, "parts": [asdict(result) for result in results]}, indent=1) + "\n")
