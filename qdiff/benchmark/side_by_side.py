"""What runs on one machine cost each other: a command by itself, and several times side by side."""

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
from qdiff.io.repository import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"

Together = Callable[[Sequence[str], Sequence[Path], int], None]
"""Runs a command once for every run folder, all at the same time, with so many threads each."""


def check_command(command: Sequence[str], scripts: Collection[str]) -> list[str]:
    """Return the command of a sampling script without the ``--`` before it.

    Args:
        scripts: the names of all sampling scripts.

    Raises:
        UserError: it names no sampling script, or a run folder of its own.
    """
    words = list(command[1:] if command[:1] == ["--"] else command)
    if not words or words[0] not in scripts:
        named = words[0] if words else "nothing"
        raise UserError(f"the command begins with {named}; name a sampling script first, one of {', '.join(scripts)}")
    for folder in ("-l", "--logdir", "--outdir"):
        if folder in words:
            raise UserError(f"the command has {folder}; leave it out, every run gets a folder of its own")
    return words


def run_together(command: Sequence[str], folders: Sequence[Path], threads: int) -> None:
    """Run a sampling script once for every folder, all at the same time.

    Raises:
        UserError: one of them failed; its error is on stderr.
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
        alone, together: its seconds, of every run.
        slowdown: of the runs side by side against the one before them, repeat by repeat.
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
        folder: of the run folders.
        runs: how many side by side.
        repeats: how often both.
        threads: of every run.

    Returns:
        Every phase that the runs' manifests have the seconds of.
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
    """Return the table and a line that says what was measured, and where."""
    lines = [f"| phase | alone ↓ | {runs} side by side, each ↓ | × alone ↓ |", "| --- | --- | --- | --- |"]
    for phase in phases:
        cells = [_text(phase.alone, " s"), _text(phase.together, " s"), _text(phase.slowdown)]
        lines.append(f"| {phase.name} | {' | '.join(cells)} |")
    waiting = " ".join(f"{name}={os.environ[name]}" for name in PASSIVE if name in os.environ)
    parts = [
        f"medians of {repeats} repeats in turns, quartiles in brackets",
        f"idle threads: {waiting}",
        machine_text(machine),
        f"`{shlex.join(command)}`",
    ]
    return "\n".join([*lines, "", "; ".join(parts)])


def _text(spread: Spread, unit: str = "") -> str:
    around = "" if spread.low == spread.high else f" ({spread.low:.2f}–{spread.high:.2f})"
    return f"{spread.middle:.2f}{unit}{around}"
