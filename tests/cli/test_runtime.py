"""Device choice, the plain case of one process, and the loop that samples what is missing."""

from __future__ import annotations

import pytest
import torch

from qdiff.cli.run_folder import RunFolder
from qdiff.cli.runtime import Processes, choose_device, peak_memory_bytes
from qdiff.cli.sampling import sample_pending
from qdiff.errors import UserError


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def two_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_default_device_without_cuda(no_cuda):
    assert choose_device(None) == torch.device("cpu")


def test_default_device_with_cuda(two_cuda):
    assert choose_device(None).type == "cuda"
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="2 CUDA devices"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "abacus", "meta", "", "cuda:x"])
def test_missing_devices_are_refused(name, no_cuda):
    with pytest.raises(UserError, match="--device") as caught:
        choose_device(name)
    assert "cpu" in str(caught.value) and "\n" not in str(caught.value)


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes(torch.device("cpu"))
    assert (alone.rank, alone.count, alone.is_first, alone.device) == (0, 1, True, torch.device("cpu"))
    alone.wait()
    assert alone.gather({"a": 1}) == [{"a": 1}]
    assert not torch.distributed.is_initialized()


def test_peak_memory_never_shrinks_and_counts_bytes():
    before = peak_memory_bytes(torch.device("cpu"))["ram"]
    block = torch.ones(1 << 28, dtype=torch.uint8)  # 256 MiB
    after = peak_memory_bytes(torch.device("cpu"))["ram"]
    assert after >= before
    assert after > block.numel()
    assert after < 1 << 40  # bytes, not KiB counted twice


class Pretended:
    """One of several processes, without the others."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count, self.is_first = rank, count, rank == 0


def constant_images(calls):
    def sample(indices):
        calls.append(list(indices))
        return torch.stack([torch.full((1, 2, 2), i / 127.5 - 1) for i in indices])

    return sample


def test_sampling_makes_what_is_missing_in_batches(tmp_path):
    run, calls = RunFolder(tmp_path / "run", {}, 7), []
    run.open()
    assert sample_pending(run, constant_images(calls), 3, Pretended(0, 1)) == 7
    assert calls == [[0, 1, 2], [3, 4, 5], [6]]
    assert run.load_images()[:, 0, 0, 0].tolist() == list(range(7))
    run.image_path(1).unlink()
    run.image_path(5).unlink()
    calls.clear()
    assert sample_pending(run, constant_images(calls), 3, Pretended(0, 1)) == 2
    assert calls == [[1, 5]]
    assert sample_pending(run, constant_images(calls), 3, Pretended(0, 1)) == 0
    assert calls == [[1, 5]]


def test_processes_share_the_images_without_overlap(tmp_path):
    run, calls = RunFolder(tmp_path / "run", {}, 7), []
    run.open()
    made = [sample_pending(run, constant_images(calls), 2, Pretended(rank, 3)) for rank in range(3)]
    assert made == [3, 2, 2]
    assert sorted(i for batch in calls for i in batch) == list(range(7))
    assert run.pending() == []


def test_sampling_needs_no_gradient(tmp_path):
    run = RunFolder(tmp_path / "run", {}, 1)
    run.open()
    modes = []

    def sample(indices):
        modes.append(torch.is_grad_enabled())
        return torch.zeros(1, 1, 2, 2)

    sample_pending(run, sample, 1, Pretended(0, 1))
    assert modes == [False]
