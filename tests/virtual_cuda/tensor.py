"""Tensors that say they are on ``cuda:0`` and hold a CPU tensor, pinned memory, and generators of the device."""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

CPU = torch.device("cpu")


class VirtualTensor(torch.Tensor):
    """Reports a CUDA device and holds a CPU tensor, ``inner``."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> VirtualTensor:
        out = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        out.inner = inner
        memory.hold(inner, device.index)
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        from virtual_cuda.dispatch import run

        return run(func, args, kwargs or {})

    # `nn.Module.to` swaps tensors of such classes in place: parameters stay themselves, as on CUDA.
    def __tensor_flatten__(self):
        return ["inner"], str(self.device)

    @staticmethod
    def __tensor_unflatten__(inner, device, *_):
        return VirtualTensor(inner["inner"], torch.device(device))

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False):
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_, **__):
        return self.numpy()

    def record_stream(self, stream: object) -> None:
        """Nothing: there is one stream."""

    def pin_memory(self, *_):
        raise RuntimeError(f"cannot pin a tensor of {self.device}: only dense CPU tensors can be pinned")

    def is_pinned(self, *_) -> bool:
        return False

    def __deepcopy__(self, memo: dict):
        if id(self) in memo:
            return memo[id(self)]
        out = VirtualTensor(self.inner.detach().clone(), self.device)
        out.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            out._is_param = True
        memo[id(self)] = out
        return out

    def __reduce_ex__(self, protocol):
        """As tensors of CUDA: they come back on the device, or where ``torch.load(map_location=…)`` says."""
        if getattr(self, "_is_param", False):
            return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, OrderedDict())
        made = (self.detach().cpu(), self.dtype, str(self.device), self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, made

    def __repr__(self, **_) -> str:
        return f"VirtualTensor({tuple(self.shape)}, {self.dtype}, {self.device})"


class DeviceMemory:
    """Bytes that tensors of the devices hold, storages shared by views counted once.

    Attributes:
        capacity: bytes of each device; a tensor beyond it is a `torch.OutOfMemoryError`.
        others: bytes that other programs hold.
    """

    def __init__(self) -> None:
        self.capacity, self.others = 80 << 30, 0
        self.held: Counter[int] = Counter()
        self.peak: Counter[int] = Counter()
        self._live: set[int] = set()

    def free(self, device: int) -> int:
        """Return the bytes that are free."""
        return self.capacity - self.others - self.held[device]

    def hold(self, inner: Tensor, device: int) -> None:
        """Count a tensor's storage until nobody has it."""
        storage = inner.untyped_storage()
        inner.kept_storage = storage  # the finaliser is that of the Python object: it lives as long as the tensor
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        if size > self.free(device):
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes; {self.free(device)} bytes are free."
            )
        self._live.add(key)
        weakref.finalize(storage, self._give_up, key, size, device)
        self.held[device] += size
        self.peak[device] = max(self.peak[device], self.held[device])

    def _give_up(self, key: int, size: int, device: int) -> None:
        self._live.discard(key)
        self.held[device] -= size


memory = DeviceMemory()


class PinnedMemory:
    """Which CPU storages are page-locked."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> Tensor:
        """Note a CPU tensor's storage as pinned, and return the tensor."""
        self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
        reference = StorageWeakRef(tensor.untyped_storage())
        self._storages[reference.cdata] = reference
        return tensor

    def __contains__(self, tensor: Tensor) -> bool:
        if not self._storages or tensor.layout is not torch.strided:
            return False
        reference = self._storages.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()


pinned = PinnedMemory()

_RealGenerator = torch._C.Generator
_generators: dict[int, torch.device] = {}


class VirtualGenerator(_RealGenerator):
    """A generator of the device: one of the CPU that says it is elsewhere."""

    def __new__(cls, device: torch.device | str = "cpu") -> VirtualGenerator:
        return super().__new__(cls, "cpu")

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        # By the C++ object: the dispatcher gives another Python object of it.
        _generators[self._cdata] = torch.device("cuda", device.index or 0)
        weakref.finalize(self, _generators.pop, self._cdata, None)

    @property
    def device(self) -> torch.device:
        return _generators[self._cdata]


class _IsGenerator(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _RealGenerator)


class Generator(metaclass=_IsGenerator):
    """Takes the place of `torch.Generator`."""

    def __new__(cls, device: torch.device | str = "cpu"):
        on_device = torch.device(device).type == "cuda"
        return VirtualGenerator(device) if on_device else _RealGenerator(device)


def generator_device(generator: _RealGenerator) -> torch.device:
    """Return where a generator belongs."""
    return _generators.get(generator._cdata, CPU)
