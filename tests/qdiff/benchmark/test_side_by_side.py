"""Runs side by side against one alone: which are started, and what their manifests' seconds say."""

from __future__ import annotations

import json

import pytest
from families import SCRIPTS

from qdiff.benchmark import side_by_side as module
from qdiff.benchmark.side_by_side import check_command, markdown, measure_side_by_side
from qdiff.errors import UserError

COMMAND = ["sample_diffusion_ddim", "--config", "configs/digits.yml"]
MACHINE = {"cpu": "a CPU", "flags": [], "cores": 2, "usable_cores": 2, "memory_bytes": 2**34, "threads": 2, "load": 0.1}


class Runs:
    """Writes the manifests that runs would: each phase takes as long as runs are there at the time."""

    def __init__(self) -> None:
        self.started: list[int] = []

    def __call__(self, command, folders, threads):
        assert (command, threads) == (COMMAND, 2)
        self.started.append(len(folders))
        for folder in folders:
            folder.mkdir()
            seconds = {"calibration": 10.0 * len(folders), "sampling": 1.0, "recording": 0.0}
            (folder / "run.json").write_text(json.dumps({"seconds": seconds}))


@pytest.fixture
def measured(tmp_path):
    runs = Runs()
    return runs, measure_side_by_side(COMMAND, tmp_path, runs=3, repeats=2, threads=2, together=runs)


def test_alone_and_side_by_side_take_turns(measured):
    runs, phases = measured
    assert runs.started == [1, 3, 1, 3]
    assert [(p.name, p.alone.middle, p.together.middle, p.slowdown.middle) for p in phases] == [
        ("calibration", 10, 30, 3),
        ("sampling", 1, 1, 1),  # and nothing of what took no time
    ]


def test_the_table(measured, monkeypatch):
    for name in module.PASSIVE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    text = markdown(measured[1], COMMAND, 3, 2, {**MACHINE, "packages": {"torch": "2"}})
    assert "| calibration | 10.00 s | 30.00 s | 3.00 |" in text
    assert "3 side by side" in text and "idle threads: OMP_WAIT_POLICY=ACTIVE;" in text and " ".join(COMMAND) in text


def test_commands():
    assert check_command(["--", *COMMAND], SCRIPTS) == check_command(COMMAND, SCRIPTS) == COMMAND
    with pytest.raises(UserError, match="begins with nothing"):
        check_command(["--"], SCRIPTS)
    with pytest.raises(UserError, match="begins with evaluate; give a sampling script"):
        check_command(["evaluate"], SCRIPTS)
    with pytest.raises(UserError, match="has -l; leave it out"):
        check_command([*COMMAND, "-l", "runs/a"], SCRIPTS)


@pytest.mark.slow
def test_a_command_that_fails(tmp_path, capfd):
    """A real process, which refuses its options before it loads anything."""
    with pytest.raises(UserError, match="failed with exit code 2"):
        module.run_together(["sample_diffusion_ddim", "--timesteps", "x"], [tmp_path / "a", tmp_path / "b"], 1)
    assert capfd.readouterr().err.count("error: argument --timesteps") == 2
