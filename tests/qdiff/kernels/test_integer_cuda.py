"""Integer products in what CUDA's kernel takes: padding, layout, and the check of a device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_integer import LAYERS, one_layer, run

from qdiff.kernels import integer_matmul as integer
from qdiff.kernels.integer_matmul import int8_is_exact, int8_matmul


class CudaInts:
    """``torch._int_mm`` as CUDA has it: exact, and with its refusals (`_int_mm_out_cuda` of PyTorch's Blas.cpp)."""

    def __init__(self):
        self.shapes = []

    def __call__(self, a, b):
        (rows, terms), columns = a.shape, b.shape[1]
        if rows <= 16:
            raise RuntimeError(f"self.size(0) needs to be greater than 16, but got {rows}")
        if terms == 0 or terms % 8:
            raise RuntimeError(f"self.size(1) needs to be greater than 0 and a multiple of 8, but got {terms}")
        if columns == 0 or columns % 8:
            raise RuntimeError(f"mat2.size(1) needs to be greater than 0 and a multiple of 8, but got {columns}")
        assert a.dtype == b.dtype == torch.int8 and a.is_contiguous() and b.t().is_contiguous()
        self.shapes.append((rows, terms, columns))
        return (a.long() @ b.long()).int()


@pytest.fixture
def cuda_ints(monkeypatch):
    """CUDA's products on CPU tensors."""
    fake = CudaInts()
    monkeypatch.setattr(torch, "_int_mm", fake)
    monkeypatch.setattr(integer, "int8_matmul", integer._padded_int_mm)
    int8_is_exact.cache_clear()
    yield fake
    int8_is_exact.cache_clear()


@pytest.mark.parametrize("columns", [1, 5, 8, 13])
@pytest.mark.parametrize("terms", [1, 7, 8, 71])
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 33])
def test_padding_to_what_cuda_takes_changes_no_sum(rows, terms, columns, cuda_ints, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (rows, terms), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (terms, columns), generator=generator, dtype=torch.int8)
    expected = (a.long() @ b.long()).int()
    for factor in (b, b.t().contiguous().t()):
        assert torch.equal(integer._padded_int_mm(a, factor), expected)
    with monkeypatch.context() as patch:
        for name, size, lacks in (("CUDA_ROWS", 16, rows < 17), ("CUDA_MULTIPLE", 1, terms % 8 or columns % 8)):
            patch.setattr(integer, name, size)
            if lacks:  # planted: less padding is refused
                with pytest.raises(RuntimeError, match="size"):
                    integer._padded_int_mm(a, b)
            patch.undo()
    if rows > 0:
        pad = torch.nn.functional.pad
        monkeypatch.setattr(torch.nn.functional, "pad", lambda t, sizes: pad(t, sizes, value=1))
        changed = not torch.equal(integer._padded_int_mm(a, b), expected)
        assert changed == (terms % 8 > 0), "planted: padded with ones"


@pytest.mark.parametrize("bits", [(4, 8), (8, 8)])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_by_cudas_products(kind, bits, cuda_ints, monkeypatch):
    """The same as by float64, to the bit: both sums are exact. An output channel goes beside one of ones."""
    qnn, steps = one_layer(kind, bits, "sample", split=True)
    qnn.pack_weights(integer=True)
    found = run(qnn, steps)
    assert cuda_ints.shapes
    monkeypatch.setattr(integer, "int8_is_exact", lambda device: False)
    assert torch.equal(found, run(qnn, steps))


def test_the_check_has_sizes_that_cuda_takes(cuda_ints):
    assert int8_is_exact(torch.device("cpu")) and cuda_ints.shapes == [(32, 64, 32)]


def test_the_device_decides(monkeypatch):
    monkeypatch.setattr(integer, "_padded_int_mm", lambda a, b: "padded")
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: "as it is")
    on = {name: SimpleNamespace(device=torch.device(name)) for name in ("cpu", "cuda")}
    assert {name: int8_matmul(a, a) for name, a in on.items()} == {"cpu": "as it is", "cuda": "padded"}
