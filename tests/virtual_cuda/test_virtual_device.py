"""The virtual GPU refuses what CUDA refuses, counts what it is asked to count, and leaves nothing behind."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from virtual_cuda import DeviceMismatch, Direction, virtual_cuda
from virtual_cuda.modules import left_behind
from virtual_cuda.tensor import VirtualTensor


@pytest.fixture
def x(cuda):
    return torch.arange(12.0, device="cuda").view(3, 4)


# --- What is refused


def test_tensors_of_two_devices(x):
    with pytest.raises(DeviceMismatch, match="at least two devices, cpu and cuda:0"):
        x + torch.ones(4)
    with pytest.raises(DeviceMismatch):
        x @ torch.ones(4, 2)
    with pytest.raises(DeviceMismatch):
        torch.ones(3, 4).add_(x)
    with pytest.raises(DeviceMismatch):
        torch.ones(5)[torch.tensor([0, 1], device="cuda")]
    assert torch.equal((x + torch.tensor(1.0)).cpu(), torch.arange(12.0).view(3, 4) + 1)  # a number may


def test_numpy(x):
    for read in (x.numpy, lambda: np.asarray(x)):
        with pytest.raises(TypeError, match=r"Use Tensor.cpu"):
            read()
    assert x.cpu().numpy().sum() == 66


def test_generators_of_the_other_device(cuda):
    ours, theirs = torch.Generator("cuda").manual_seed(1), torch.Generator().manual_seed(1)
    assert ours.device == torch.device("cuda", 0) and isinstance(ours, torch.Generator)
    assert torch.randn(2, generator=ours, device="cuda").device.type == "cuda"
    for generator, device in ((theirs, "cuda"), (ours, "cpu")):
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.randn(2, generator=generator, device=device)


def test_products_that_cuda_lacks(cuda):
    def integers(*shape, dtype=torch.int8):
        return torch.ones(shape, dtype=dtype, device="cuda")

    assert torch._int_mm(integers(17, 8), integers(8, 16)).dtype == torch.int32
    for rows, inner, columns in ((16, 8, 8), (17, 12, 8), (17, 8, 9)):
        with pytest.raises(RuntimeError, match=r"self.size"):
            torch._int_mm(integers(rows, inner), integers(inner, columns))
    with pytest.raises(NotImplementedError, match="not implemented for 'int32'"):
        integers(4, 4, dtype=torch.int32) @ integers(4, 4, dtype=torch.int32)


def test_a_parameter_left_on_the_cpu(x):
    layer = nn.Sequential(nn.Linear(4, 2)).to("cuda")
    layer[0].scale = nn.Parameter(torch.ones(()))
    assert left_behind(layer) == ["0.scale"]
    with pytest.raises(DeviceMismatch, match=r"0.scale is on the CPU"):
        layer(x)


def test_more_than_there_is(cuda):
    cuda.memory.capacity = 1 << 20
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(1 << 19, device="cuda")


# --- What is counted


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x[0, 0].item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 3).any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 3],
        lambda x: torch.equal(x, x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.linalg.cholesky(x[:, :3] * 0 + torch.eye(3, device="cuda")),
    ],
    ids=["item", "float", "bool", "nonzero", "mask", "equal", "tolist", "cpu", "synchronize", "tensor", "cholesky"],
)
def test_waits(read, x, cuda):
    assert len(cuda.counted(read, x).waits) == 1


def test_what_does_not_wait(x, cuda):
    def work():
        y = (x * 2 + x.sum()).view(4, 3)[1:]
        torch.zeros(3, device="cuda").add_(1)
        torch.linalg.cholesky_ex(torch.eye(3, device="cuda"))
        return torch.where(y > 1, y, 0.0).clamp_(0, 5)

    assert cuda.counted(work).waits == []


def test_transfers(cuda):
    page, pinned = torch.ones(4, 2), torch.empty(4, 2, pin_memory=True)
    assert pinned.is_pinned() and pinned[1:3].is_pinned() and page.pin_memory().is_pinned() and not page.is_pinned()

    def seen(work):
        (found,) = cuda.counted(work).transfers
        return found.direction, found.pinned, found.waits, found.bytes

    H2D, D2H = Direction.H2D, Direction.D2H
    assert seen(lambda: page.to("cuda")) == seen(lambda: page.to("cuda", non_blocking=True)) == (H2D, False, True, 32)
    assert seen(lambda: pinned.to("cuda")) == (H2D, True, True, 32)
    assert seen(lambda: pinned[1:3].to("cuda", non_blocking=True)) == (H2D, True, False, 16)
    # Another dtype or layout: it goes through pageable memory.
    assert seen(lambda: pinned.to("cuda", torch.half, non_blocking=True)) == (H2D, False, True, 32)
    assert seen(lambda: pinned.t().to("cuda", non_blocking=True)) == (H2D, False, True, 32)
    on = torch.ones(4, device="cuda")
    assert seen(lambda: on.cpu()) == (D2H, False, True, 16)
    assert seen(lambda: on.to("cpu", non_blocking=True)) == (D2H, True, False, 16)
    assert seen(lambda: pinned[0].copy_(on[:2], non_blocking=True)) == (D2H, True, False, 8)
    assert seen(lambda: on.copy_(torch.ones(4))) == (H2D, False, True, 16)
    assert seen(lambda: on[torch.tensor([1, 2])])[0] is H2D


def test_launches_and_custom_operations(x, cuda):
    @torch.library.custom_op("virtual_cuda_tests::twice", mutates_args=())
    def twice(values: torch.Tensor) -> torch.Tensor:
        return (values + values).mul(1.0)

    counts = cuda.counted(lambda: twice(x) + 1)
    assert counts.operations == {"twice": 1, "add": 1} and counts.launches == 2
    assert cuda.counted(lambda: x.view(4, 3).t()[1:]).launches == 0
    attention = nn.functional.scaled_dot_product_attention
    q = torch.randn(2, 1, 5, 8, device="cuda")
    assert cuda.counted(lambda: attention(q, q, q)).launches == 1
    assert torch.allclose(attention(q, q, q).cpu(), attention(*[q.cpu()] * 3), atol=1e-6)
    with cuda.counting() as outer:
        x + 1
        with cuda.counting() as inner:
            x + 1
    assert (outer.launches, inner.launches) == (2, 1)


def test_memory(cuda):
    before = torch.cuda.memory_allocated()
    held = torch.zeros(1 << 18, device="cuda")
    view = held[1:]
    assert torch.cuda.memory_allocated() - before == 1 << 20
    free, total = torch.cuda.mem_get_info()
    cuda.memory.others = 1 << 30
    assert torch.cuda.mem_get_info() == (free - (1 << 30), total)
    del held, view
    assert torch.cuda.memory_allocated() == before and torch.cuda.max_memory_allocated() >= before + (1 << 20)


# --- What it computes, copies and keeps


def test_autocast(x, cuda):
    layer = nn.Linear(4, 8).to("cuda")
    with torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("cuda", dtype=dtype):
                made = layer(x)
                assert made.dtype == dtype and made.softmax(-1).dtype == torch.float32
        with torch.autocast("cuda"):
            assert layer(x).dtype == torch.float16
        assert layer(x).dtype == torch.float32


def test_copies_and_files(cuda):
    layer = nn.Linear(4, 2).to("cuda")
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter) and twin.weight.device.type == "cuda" and twin.weight.requires_grad
    assert torch.equal(twin.weight.cpu(), layer.weight.cpu())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    for place, device in ((None, "cuda"), ("cpu", "cpu")):
        file.seek(0)
        state = torch.load(file, map_location=place, weights_only=True)
        assert state["weight"].device.type == device and torch.equal(state["weight"].cpu(), layer.weight.cpu())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert isinstance(torch.load(file, weights_only=False).weight, nn.Parameter)


def test_modules_move_there_and_back(cuda):
    layer = nn.BatchNorm1d(3)
    weight = layer.weight
    layer.to("cuda").half()
    assert weight is layer.weight and weight.device.type == "cuda" and weight.dtype == torch.float16
    assert left_behind(layer) == [] and not isinstance(layer.to("cpu").weight, VirtualTensor)


def test_nothing_is_left_behind():
    before = (torch.cuda.is_available, torch.Generator, torch.cuda.Stream)
    with virtual_cuda(devices=2) as device:
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2
        with torch.cuda.device(1):
            assert torch.ones(1, device="cuda").device.index == 1
        with pytest.raises(DeviceMismatch):
            torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1")
        device.memory.capacity = 5
    assert before == (torch.cuda.is_available, torch.Generator, torch.cuda.Stream)
    assert isinstance(torch.ones(2) + 1, torch.Tensor) and device.memory.capacity > 5
    layer = nn.Linear(2, 2)
    assert layer(torch.ones(1, 2)).shape == (1, 2) and not layer._forward_pre_hooks
