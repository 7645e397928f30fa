"""Memory limits of control groups: both versions, parents, containers; and what a calibration may then take."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qdiff.machine import control_groups, memory
from qdiff.machine.control_groups import memory_within_limits
from qdiff.machine.memory import available_memory

MIB = 1 << 20
VERSION_1 = {"memory.max": "memory.limit_in_bytes", "memory.current": "memory.usage_in_bytes"}


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """``groups(lines)``: the process is in the groups that these lines name; returns the folder of their files."""

    def of_process(*lines: str) -> Path:
        (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(control_groups, "_GROUPS", tmp_path / "cgroup")
        monkeypatch.setattr(control_groups, "_MOUNT", tmp_path / "mount")
        return tmp_path / "mount"

    return of_process


def limit(group: Path, most: int | str, used: int, cache: int, version: int = 2) -> None:
    group.mkdir(parents=True, exist_ok=True)
    names = VERSION_1 if version == 1 else {}
    prefix = "total_" if version == 1 else ""
    (group / names.get("memory.max", "memory.max")).write_text(f"{most}\n")
    (group / names.get("memory.current", "memory.current")).write_text(f"{used}\n")
    # Version 1 has the line of the group alone too, which leaves out the groups below.
    other = f"inactive_file {cache // 2}\n" if version == 1 else f"inactive_anon {cache // 2}\n"
    (group / "memory.stat").write_text(f"{other}{prefix}inactive_file {cache}\n")


def test_page_cache_of_the_group_can_be_taken(groups):
    limit(groups("0::/job/step") / "job" / "step", 1000 * MIB, used=700 * MIB, cache=200 * MIB)
    assert memory_within_limits() == 500 * MIB


def test_the_first_version(groups):
    mount = groups("9:cpu,cpuacct:/other", "4:hugetlb,memory:/job", "0::/")
    limit(mount / "memory" / "job", 1000 * MIB, used=700 * MIB, cache=200 * MIB, version=1)
    assert memory_within_limits() == 500 * MIB


def test_a_parent_limits_too(groups):
    mount = groups("0::/job/step")
    limit(mount / "job" / "step", "max", used=100 * MIB, cache=0)
    limit(mount / "job", 400 * MIB, used=300 * MIB, cache=0)
    assert memory_within_limits() == 100 * MIB
    limit(mount / "job" / "step", 150 * MIB, used=100 * MIB, cache=0)
    assert memory_within_limits() == 50 * MIB


@pytest.mark.parametrize("path", ["/docker/0123", "/../../job"])
def test_a_container_whose_group_is_the_mount(groups, path):
    limit(groups(f"0::{path}"), 1000 * MIB, used=700 * MIB, cache=0)
    assert memory_within_limits() == 300 * MIB


def test_no_limit_is_infinity(groups, monkeypatch, tmp_path):
    limit(groups("0::/job") / "job", "max", used=MIB, cache=0)
    assert memory_within_limits() == math.inf
    monkeypatch.setattr(control_groups, "_GROUPS", tmp_path / "of another system")
    assert memory_within_limits() == math.inf


def test_a_group_that_cannot_be_read_whole_is_no_limit(groups):
    job = groups("0::/job") / "job"
    limit(job, 1000 * MIB, used=700 * MIB, cache=200 * MIB)
    (job / "memory.stat").write_text("anon 1\n")
    assert memory_within_limits() == 300 * MIB
    (job / "memory.stat").unlink()
    assert memory_within_limits() == math.inf


def test_more_used_than_allowed_leaves_nothing(groups):
    limit(groups("0::/job") / "job", MIB, used=2 * MIB, cache=0)
    assert memory_within_limits() == available_memory() == 0


def test_available_memory_keeps_to_the_limit(monkeypatch):
    monkeypatch.setattr(memory, "memory_within_limits", lambda: 3 * MIB)
    assert available_memory() == 3 * MIB
