"""The lines of scripts/gpu_check.py about the test suite."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence

from qdiff.benchmark.gpu_check import Line
from qdiff.cli.script import Scripts
from qdiff.io.repository import REPOSITORY

SCRIPT_TESTS = ("test_sample_diffusion_ddim", "test_sample_ldm_imagenet", "test_txt2img")
SMALL_TESTS = ("-k", "test_sequence_writes_every_step")
OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def marked_tests(args: Namespace, scripts: Scripts) -> Iterator[Line]:
    """Run the tests that are marked ``gpu``; only the files that have one are collected."""
    tests = REPOSITORY / "tests"
    files = [p for p in sorted(tests.rglob("test_*.py")) if "pytest.mark.gpu" in p.read_text()]
    yield _tested("pytest -m gpu", [*map(str, files), "-m", "gpu"], args.device)


def script_tests(args: Namespace, scripts: Scripts) -> Iterator[Line]:
    """Run script tests on the device, file by file."""
    for name in SCRIPT_TESTS[:1] if args.small else SCRIPT_TESTS:
        words = [str(REPOSITORY / "tests" / "scripts" / f"{name}.py"), *(SMALL_TESTS if args.small else ())]
        yield _tested(name, words, args.device)


def counted(output: str) -> dict[str, int]:
    """Return the counts of pytest's last line, by outcome."""
    last = next((line for line in reversed(output.splitlines()) if re.search(r"\d+ \w+.* in ", line)), "")
    found = {word.rstrip("s") if word == "errors" else word: int(n) for n, word in re.findall(r"(\d+) (\w+)", last)}
    return {outcome: found[outcome] for outcome in OUTCOMES if outcome in found}


def _tested(what: str, words: Sequence[str], device: str) -> Line:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rfE", *words]
    surroundings = {**os.environ, "QDIFF_TEST_DEVICE": device}
    done = subprocess.run(command, cwd=REPOSITORY, env=surroundings, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n")  # into the part's log
    counts = counted(done.stdout)
    failures = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR "))]
    found = ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or f"exit code {done.returncode}"
    if failures:
        found += f": {'; '.join(failures[:3])}"
    return Line(what, found, "no failure", done.returncode == 0, values=counts)
