"""The fused kernels as operations: what calls them, when, and what stands in for them."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from qdiff.errors import UserError
from qdiff.functional import fake_quantize, fake_quantize_inference
from qdiff.kernels import fake_quantize as operation
from qdiff.kernels.switch import check_available, fused, runs_fused

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
DELTA, ZERO = torch.tensor(0.1), torch.tensor(7, dtype=torch.int32)


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it is on CUDA and notes what is computed on it."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        out = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device="cuda:0"
        )
        out.inner = inner
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func._schema.name)
        inner = torch.utils._pytree.tree_map_only(Elsewhere, lambda t: t.inner, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, Elsewhere, func(*inner[0], **inner[1]))


@pytest.fixture
def cuda(monkeypatch):
    """CUDA tensors, of which no GPU knows."""
    torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Elsewhere.seen.clear()
    return Elsewhere


def test_off_by_default_and_restored(cuda):
    x = cuda(X)
    assert not runs_fused(x)
    with pytest.raises(KeyError), fused():
        assert runs_fused(x) and not runs_fused(X)
        with fused(False):
            assert not runs_fused(x)
        assert runs_fused(x)
        raise KeyError
    assert not runs_fused(x)


def test_one_operation_in_the_place_of_many(cuda):
    tensors = [cuda(t) for t in (X, DELTA, ZERO)]
    fake_quantize_inference(*tensors, 4)
    assert len(cuda.seen) >= 6 and "qdiff::fake_quantize" not in cuda.seen
    cuda.seen.clear()
    with fused():
        found = fake_quantize_inference(*tensors, 4)
    assert cuda.seen == ["qdiff::fake_quantize"]
    assert torch.equal(found.inner, fake_quantize_inference(X, DELTA, ZERO, 4))


def test_gradients_stay_straight_through(cuda):
    class Asking(cuda):
        requires_grad = True

    with fused():
        asking = Asking(X)
        assert not runs_fused(asking)
        with torch.no_grad():
            assert runs_fused(asking)
    x = X.clone().requires_grad_()
    fake_quantize(x, DELTA, ZERO, 4).sum().backward()
    assert x.grad.abs().sum() > 0


def test_the_operation_is_sound():
    """Schema, fake tensors and tracing; on the CPU it is the plain composition."""
    channels = X.view(2, 3, 4, 1).contiguous(memory_format=torch.channels_last)
    for x, delta, zero in [
        (X, DELTA, ZERO),
        (channels, torch.rand(1, 3, 1, 1) + 0.1, torch.ones(1, 3, 1, 1, dtype=torch.int32)),
    ]:
        arguments = (x, delta, zero, 4)
        assert torch.equal(torch.ops.qdiff.fake_quantize(*arguments), fake_quantize_inference(*arguments))
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(torch.ops.qdiff.fake_quantize.default, arguments, test_utils=checks)


@torch.no_grad()
def test_compiled_it_stays_one_operation():
    graphs = []

    def backend(module, inputs):
        graphs.append([n.target for n in module.graph.nodes if n.op == "call_function"])
        return module

    compiled = torch.compile(lambda x: torch.ops.qdiff.fake_quantize(x, DELTA, ZERO, 4) + 1, backend=backend)
    assert torch.equal(compiled(X), fake_quantize_inference(X, DELTA, ZERO, 4) + 1)
    ((first, *rest),) = graphs
    assert "fake_quantize" in str(first) and len(rest) == 1


def test_the_cuda_implementation(interpreted, monkeypatch):
    """On CPU tensors, by the interpreter; what the kernel does not take is composed."""
    kernel = interpreted("fake_quantize_triton")
    launches, launch = [], kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *a: (launches.append(1), launch(*a)))
    monkeypatch.setattr("qdiff.kernels.fake_quantize_triton", kernel, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: fused(False))
    assert torch.equal(operation.on_cuda(X, DELTA, ZERO, 4), fake_quantize_inference(X, DELTA, ZERO, 4))
    assert launches == [1]
    strided = X[:, ::2]
    assert torch.equal(operation.on_cuda(strided, DELTA, ZERO, 4), fake_quantize_inference(strided, DELTA, ZERO, 4))
    assert launches == [1]


@torch.no_grad()
def test_every_call_of_a_quantized_network_is_taken(calibrated, held_out, compiled):
    """Split shortcuts, attention's heads, embeddings, softmax: none falls back to the composition."""
    kernel = compiled("fake_quantize_triton")
    qnn, calls = calibrated(weight_bits=4, act_bits=8, split_shortcut=True), []

    def noted(x, delta, zero_point, bits):
        calls.append(kernel.layout_of(x, delta, zero_point, torch.empty_like(x)))
        return fake_quantize_inference(x, delta, zero_point, bits)

    with pytest.MonkeyPatch.context() as patch, qnn.quantized():
        patch.setattr("qdiff.quantizer.fake_quantize_inference", noted)
        qnn(*held_out)
    assert len(calls) == len(qnn.act_quantizers()) and None not in calls


def test_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="not on a CUDA device"), fused():
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="not on a CUDA device"):
        check_available(torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton"):
        check_available(torch.device("cuda", 0))
    assert not runs_fused(X)
