"""Norms on the meta device: right shapes without PyTorch's derivation, which finds sizes that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qdiff.machine.meta_device import NormsKeepShapes

NORMS = {
    "groups": (lambda: nn.GroupNorm(4, 8), (2, 8, 3, 5)),
    "groups without weights": (lambda: nn.GroupNorm(4, 8, affine=False), (1, 8, 6)),
    "layers": (lambda: nn.LayerNorm(8), (2, 5, 8)),
    "layers of two dimensions": (lambda: nn.LayerNorm((5, 8)), (2, 5, 8)),
}
WRONG = {
    "weights of other channels": (lambda: nn.GroupNorm(4, 8), (2, 12, 3, 5)),
    "groups that do not divide": (lambda: nn.GroupNorm(4, 8, affine=False), (2, 6, 3, 5)),
    "one value in a group": (lambda: nn.GroupNorm(8, 8), (1, 8, 1, 1)),
    "another last dimension": (lambda: nn.LayerNorm(8), (2, 5, 7)),
}


class Dispatched(TorchDispatchMode):
    """Names of the operations that reached PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", NORMS)
def test_shapes_and_dtypes_are_those_of_torch(name, dtype):
    norm, shape = NORMS[name]
    with torch.device("meta"):
        module, x = norm().to(dtype), torch.zeros(shape, dtype=dtype)
    with Dispatched() as there:
        wanted = module(x)
    with Dispatched() as here, NormsKeepShapes():
        found = module(x)
    assert any("norm" in each for each in there.names) and not any("norm" in each for each in here.names)
    assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    assert found.is_meta


@pytest.mark.parametrize("name", WRONG)
def test_sizes_that_do_not_fit_raise_what_torch_raises(name):
    norm, shape = WRONG[name]
    with torch.device("meta"):
        module, x = norm(), torch.zeros(shape)
    with pytest.raises((RuntimeError, ValueError)) as wanted:
        module(x)
    with NormsKeepShapes(), pytest.raises(wanted.type) as found:
        module(x)
    assert str(found.value) == str(wanted.value)


def test_tensors_with_values_are_computed():
    module, x = nn.GroupNorm(4, 8), torch.randn(2, 8, 3, 5)
    wanted = module(x)
    with NormsKeepShapes():
        assert torch.equal(module(x), wanted)
