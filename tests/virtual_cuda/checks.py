"""What CUDA refuses: tensors of two devices in one operation, generators of another device, products it lacks."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_cuda.operands import name_of, written_arguments
from virtual_cuda.tensor import VirtualTensor, generator_device

aten = torch.ops.aten

COPIES = {aten.copy_.default, aten._to_copy.default}
# Indices may be on the CPU: they are copied to the device.
INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
# Numbers on the CPU are arguments of these operations' kernels.
_TAKE_NUMBERS = {aten.fill_.Tensor, aten.where.self, aten.masked_fill_.Tensor, aten.masked_fill.Tensor}
PRODUCTS = {
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.mv.default,
    aten.dot.default,
    aten.convolution.default,
}


class DeviceMismatch(RuntimeError):
    """Tensors of two devices met."""


def check_devices(func, args: tuple, tensors: list[Tensor]) -> None:
    """Raise `DeviceMismatch` where CUDA's kernels would not take the tensors together; one at least is virtual."""
    if func in COPIES:
        return
    virtual = [t for t in tensors if isinstance(t, VirtualTensor)]
    if len(virtual) == len(tensors) and all(t.device == virtual[0].device for t in virtual[1:]):
        return
    if len({t.device for t in virtual}) > 1:
        _refuse(func, tensors)
    others = [t for t in tensors if not isinstance(t, VirtualTensor) and not t.is_meta]
    if func in INDEXING:
        _check_indexing(func, args, tensors)
        return
    takes_numbers = torch.Tag.pointwise in func.tags or func in _TAKE_NUMBERS
    if any(not takes_numbers or t.dim() > 0 for t in others):
        _refuse(func, tensors)
    for place in written_arguments(func):
        value = args[place] if place < len(args) else None
        if isinstance(value, Tensor) and not isinstance(value, VirtualTensor):
            _refuse(func, tensors)


def _check_indexing(func, args: tuple, tensors: list[Tensor]) -> None:
    own, _, *rest = args
    if not isinstance(own, VirtualTensor):
        raise DeviceMismatch("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if any(isinstance(v, Tensor) and not isinstance(v, VirtualTensor) and v.dim() > 0 for v in rest):
        _refuse(func, tensors)


def _refuse(func, tensors: list[Tensor]) -> None:
    devices = " and ".join(sorted({str(t.device) for t in tensors}))
    shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
    raise DeviceMismatch(
        f"Expected all tensors to be on the same device, but found at least two devices, {devices}! ({func}: {shapes})"
    )


def check_generator(kwargs: dict, device: torch.device | None) -> None:
    """Raise where random numbers are asked of a generator of another kind of device."""
    generator = kwargs.get("generator")
    if generator is None:
        return
    ours, theirs = "cpu" if device is None else device.type, generator_device(generator).type
    if ours != theirs:
        raise RuntimeError(f"Expected a '{ours}' device type for generator but found '{theirs}'")


def check_products(func, tensors: list[Tensor]) -> None:
    """Raise where CUDA has no kernel for a product: integers, and shapes that `torch._int_mm` does not take."""
    if func in PRODUCTS and not (tensors[0].is_floating_point() or tensors[0].is_complex()):
        kind = str(tensors[0].dtype).removeprefix("torch.")
        raise NotImplementedError(f"\"{name_of(func)}_cuda\" not implemented for '{kind}'")
    if func is aten._int_mm.default:
        (rows, inner), columns = tensors[0].shape, tensors[1].shape[1]
        if rows <= 16:
            raise RuntimeError(f"self.size(0) needs to be greater than 16, but got {rows}")
        if inner % 8 or columns % 8:
            raise RuntimeError(
                f"self.size(1) and mat2.size(1) need to be greater than 0 and a multiple of 8, but got {inner} and "
                f"{columns}"
            )
