"""How much runs on one machine slow each other down: a command by itself, and several times side by side."""

from __future__ import annotations

from qdiff.cli.passive_waiting import PASSIVE

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from qdiff.benchmark.machine import machine_text
from qdiff.benchmark.timing import Spread
from qdiff.errors import UserError
from qdiff.io.markdown import markdown_table
from qdiff.io.repository import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"

Together = Callable[[Sequence[str], Sequence[Path], int], None]
"""Runs a command once per run folder, all at the same time, each with the given number of threads."""


def check_command(command: Sequence[str], scripts: Collection[str]) -> list[str]:
    """Return the command of a sampling script without the leading ``--``.

    Args:
        scripts: the names of all sampling scripts.

    Raises:
        UserError: the command names no sampling script, or has an option for the run folder.
    """
    words = list(command[1:] if command[:1] == ["--"] else command)
    if not words or words[0] not in scripts:
        named = words[0] if words else "nothing"
        raise UserError(f"the command begins with {named}; give a sampling script first, one of {', '.join(scripts)}")
    for folder in ("-l", "--logdir", "--outdir"):
        if folder in words:
            raise UserError(f"the command has {folder}; leave it out, every run gets a folder of its own")
    return words


def run_together(command: Sequence[str], folders: Sequence[Path], threads: int) -> None:
    """Run a sampling script once per folder, all at the same time.

    Raises:
        UserError: a run failed; its error is on stderr.
    """
    script, *options = command
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / f"{script}.py"), *options, "-l", str(folder)],
            env=environment,
            stdout=sys.stderr,
        )
        for folder in folders
    ]
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    if any(codes):
        raise UserError(f"the command failed with exit code {max(codes, key=abs)} (its error is above)")


@dataclass(frozen=True)
class Phase:
    """A part of a run, e.g. ``calibration``.

    Attributes:
        alone, together: seconds of the runs by themselves, and of the runs side by side.
        slowdown: seconds of the runs side by side divided by those of the preceding run by itself, per repeat.
    """

    name: str
    alone: Spread
    together: Spread
    slowdown: Spread


def measure_side_by_side(
    command: Sequence[str], folder: Path, runs: int, repeats: int, threads: int, together: Together = run_together
) -> list[Phase]:
    """Run a command by itself and then several times side by side, in turns.

    Args:
        command: see `check_command`.
        folder: parent folder of the run folders.
        runs: number of runs side by side.
        repeats: how often both are repeated.
        threads: threads per run.

    Returns:
        Every phase for which the runs' manifests have seconds.
    """
    alone: list[dict[str, float]] = []
    beside: list[list[dict[str, float]]] = []
    for repeat in range(repeats):
        single = folder / f"alone-{repeat}"
        together(command, [single], threads)
        alone.append(_seconds(single))
        several = [folder / f"beside-{repeat}-{number}" for number in range(runs)]
        together(command, several, threads)
        beside.append([_seconds(path) for path in several])
    return [
        Phase(
            name,
            Spread.of([taken[name] for taken in alone]),
            Spread.of([taken[name] for both in beside for taken in both]),
            Spread.of([taken[name] / a[name] for a, both in zip(alone, beside, strict=True) for taken in both]),
        )
        for name in alone[0]
        if all(taken[name] for taken in alone)
    ]


def _seconds(folder: Path) -> dict[str, float]:
    return json.loads((folder / "run.json").read_text())["seconds"]


def markdown(phases: Sequence[Phase], command: Sequence[str], runs: int, repeats: int, machine: dict) -> str:
    """Return the table and a line about the command and the machine."""
    head = ["phase", "alone ↓", f"{runs} side by side, each ↓", "× alone ↓"]
    lines = [
        [phase.name, _text(phase.alone, " s"), _text(phase.together, " s"), _text(phase.slowdown)] for phase in phases
    ]
    waiting = " ".join(f"{name}={os.environ[name]}" for name in PASSIVE if name in os.environ)
    parts = [
        f"medians of {repeats} repeats in turns, quartiles in brackets",
        f"idle threads: {waiting}",
        machine_text(machine),
        f"`{shlex.join(command)}`",
    ]
    return f"{markdown_table(lines, head)}\n\n{'; '.join(parts)}"


def _text(spread: Spread, unit: str = "") -> str:
    around = "" if spread.low == spread.high else f" ({spread.low:.2f}–{spread.high:.2f})"
    return f"{spread.middle:.2f}{unit}{around}"
