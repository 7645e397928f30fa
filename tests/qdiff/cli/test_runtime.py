"""Device choice, the plain case of one process, and the loop that samples what is missing."""

from __future__ import annotations

import pytest
import torch

from qdiff.cli.pending import sample_pending
from qdiff.cli.processes import Processes, arithmetic_of, choose_device, describe_gpu, peak_memory_bytes
from qdiff.cli.run_folder import RunFolder
from qdiff.errors import UserError


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def two_cuda(monkeypatch):
    """Two GPUs, one process; a list of those that were made the one to launch on."""
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return made_current


@pytest.fixture(autouse=True)
def tf32_as_before():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def torchrun(monkeypatch):
    """``torchrun(local, processes)``: this process is one of several."""

    def started(local: int, processes: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", str(local))

    return started


def test_default_device_without_cuda(no_cuda):
    assert choose_device(None) == torch.device("cpu")


def test_default_device_with_cuda(two_cuda):
    assert choose_device(None).type == "cuda"
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="2 CUDA devices"):
        choose_device("cuda:2")


def test_kernels_are_launched_on_the_device_that_was_chosen(two_cuda):
    choose_device("cuda:1")
    assert two_cuda == [torch.device("cuda:1")]


@pytest.mark.parametrize("name", [None, "cuda"])
@pytest.mark.parametrize("local", [0, 1])
def test_each_process_of_a_machine_takes_a_gpu_of_its_own(name, local, two_cuda, torchrun):
    torchrun(local, 4)  # two machines of two GPUs each
    assert choose_device(name) == torch.device("cuda", local)
    assert two_cuda == [torch.device("cuda:1")] * local


def test_one_gpu_for_several_processes_is_a_contradiction(two_cuda, torchrun):
    torchrun(1, 2)
    with pytest.raises(UserError, match=r"--device cuda:0 .* 2 processes .*give --device cuda,") as caught:
        choose_device("cuda:0")
    assert "\n" not in str(caught.value)
    assert choose_device("cpu") == torch.device("cpu")
    torchrun(0, 1)  # EDA-DM's commands name cuda:0 and run alone
    assert choose_device("cuda:0") == torch.device("cuda:0")


def test_more_processes_than_gpus(two_cuda, torchrun):
    torchrun(2, 3)
    with pytest.raises(UserError, match=r"GPUs \(2\); give torchrun --nproc_per_node 2"):
        choose_device(None)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_off_unless_it_is_asked_for(tf32, two_cuda):
    for backend in (torch.backends.cudnn, torch.backends.cuda.matmul):
        backend.allow_tf32 = not tf32
    device = choose_device("cuda", tf32)
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is tf32
    assert arithmetic_of(device) == {"device": "cuda", "tf32": tf32}


def test_choosing_a_device_warns_of_nothing(two_cuda, recwarn):
    choose_device("cuda", True)
    choose_device("cuda", False)
    assert [str(warning.message) for warning in recwarn] == []


def test_the_cpu_leaves_the_setting_of_gpus_alone(no_cuda):
    torch.backends.cudnn.allow_tf32 = True
    assert arithmetic_of(choose_device("cpu")) == {}
    assert torch.backends.cudnn.allow_tf32


def test_what_a_manifest_says_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    torch.backends.cudnn.allow_tf32 = False
    gpu = torch.device("cuda:1")
    assert describe_gpu(gpu, None) == {"name": "GPU 1", "tf32": False}
    assert describe_gpu(gpu, "full") == {"name": "GPU 1", "tf32": False, "precision": "full float32"}
    assert describe_gpu(gpu, "autocast")["precision"] == "autocast float16"
    assert describe_gpu(torch.device("cpu"), "autocast") is None


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
