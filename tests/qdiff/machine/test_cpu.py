"""The CPU that a run's manifest and a benchmark name."""

from __future__ import annotations

import pytest
import torch

from qdiff.machine import cpu
from qdiff.machine.cpu import cpu_name_and_flags, cpu_text

CPUINFO = """processor\t: 0
model name\t: Some CPU: fast
flags\t\t: fpu avx2 fma
"""


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """A machine whose /proc/cpuinfo holds CPUINFO."""
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(cpu, "Path", lambda path: tmp_path / "cpuinfo" if path == "/proc/cpuinfo" else None)


def test_name_and_instruction_sets_of_linux(linux):
    assert cpu_name_and_flags() == ("Some CPU: fast", {"fpu", "avx2", "fma"})


def test_no_instruction_sets_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "Path", lambda path: tmp_path / "missing")
    monkeypatch.setattr(cpu.platform, "processor", lambda: "arm")
    assert cpu_name_and_flags() == ("arm", set())


def test_the_text_names_the_kernels_in_use(linux, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert cpu_text() == "Some CPU: fast, DEFAULT"
