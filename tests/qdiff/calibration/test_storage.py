"""Activation storage: RAM up to the budget, unnamed files beyond it, both given back."""

from __future__ import annotations

import gc
import math

import pytest
import torch

from qdiff.calibration.storage import ActivationStorage


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.float16])
def test_disk_and_ram_hold_the_same(dtype, tmp_path):
    ram, disk = ActivationStorage(), ActivationStorage(0, tmp_path)
    values = torch.arange(60).reshape(3, 4, 5).to(dtype)
    kept = [storage.empty((3, 4, 5), dtype) for storage in (ram, disk)]
    for place in kept:
        place.copy_(values)
        assert place.dtype == dtype and place.device.type == "cpu"
        assert torch.equal(place, values)
    size = 60 * dtype.itemsize
    assert (ram.in_ram, ram.on_disk) == (size, 0)
    assert (disk.in_ram, disk.on_disk) == (0, size)


def test_budget_decides_tensor_by_tensor(tmp_path):
    storage = ActivationStorage(100, tmp_path)
    first = storage.empty((20,), torch.float32)
    second = storage.empty((20,), torch.float32)  # 160 bytes would exceed the budget
    third = storage.empty((5,), torch.float32)  # fits beside the first
    assert (storage.in_ram, storage.on_disk, storage.peak) == (100, 80, 180)
    del first, third
    gc.collect()
    assert (storage.in_ram, storage.on_disk) == (0, 80)
    del second
    gc.collect()
    assert (storage.in_ram, storage.on_disk, storage.peak) == (0, 0, 180)


@pytest.mark.parametrize("budget", [math.inf, 0])
def test_a_view_keeps_its_tensor_alive(budget, tmp_path):
    storage = ActivationStorage(None if budget else 0, tmp_path)
    tensor = storage.empty((4, 4), torch.float32)
    tensor.fill_(7)
    view = tensor[1:2].t()
    del tensor
    gc.collect()
    assert storage.in_ram + storage.on_disk == 64
    assert bool((view == 7).all())
    del view
    gc.collect()
    assert storage.in_ram + storage.on_disk == 0


def test_files_have_no_name(tmp_path):
    tensor = ActivationStorage(0, tmp_path).empty((1000,), torch.float32)
    assert not list(tmp_path.iterdir()), "a killed run would leave this behind"
    tensor.fill_(1)


def test_empty_tensors_are_possible(tmp_path):
    assert ActivationStorage(0, tmp_path).empty((0, 3), torch.float32).shape == (0, 3)
