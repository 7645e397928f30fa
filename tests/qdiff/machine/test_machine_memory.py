"""Readers of memory: what is held, what is free, and the most that was held."""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import pytest
import torch

from qdiff.machine import memory
from qdiff.machine.memory import available_memory, available_on, resident_memory

MIB = 1 << 20


@pytest.mark.slow
def test_resident_memory_grows_with_what_is_held():
    growths = []
    for _ in range(5):  # the kernel may take idle pages of ours away in the very moment
        before = resident_memory()
        # Mapped anew: allocators hand out again what an earlier test gave back, and that is resident already.
        with mmap.mmap(-1, 64 * MIB) as block:
            block.write(b"1" * len(block))
            growths.append(resident_memory() - before)
    assert max(growths) > 32 * MIB


def test_free_memory_of_the_cpu_is_free_ram(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 123)
    assert available_on(torch.device("cpu")) == 123


def test_free_memory_of_a_gpu_counts_what_torch_keeps_for_reuse(monkeypatch):
    cuda = SimpleNamespace(
        mem_get_info=lambda device: (10 * MIB, 80 * MIB),
        memory_reserved=lambda device: 7 * MIB,
        memory_allocated=lambda device: 4 * MIB,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    assert available_on(torch.device("cuda:0")) == 13 * MIB


def test_page_cache_counts_as_available(monkeypatch):
    of_system = SimpleNamespace(total=100 * MIB, available=60 * MIB, free=10 * MIB)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: of_system)
    monkeypatch.setattr(memory, "memory_within_limits", lambda: float("inf"))
    assert available_memory() == 60 * MIB


def test_available_ram_is_no_more_than_there_is():
    assert 0 < available_memory() <= memory.psutil.virtual_memory().total


def test_where_linux_does_not_tell_the_peak_of_the_process_is_returned(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=99))
    assert resident_memory() == memory.peak_resident_memory() == 99
