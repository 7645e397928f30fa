"""`torch.cuda` while the virtual device is there."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from virtual_cuda.dispatch import recorder
from virtual_cuda.tensor import memory

CAPABILITY = (9, 0)
NAME = "Virtual GPU"


class Stream:
    """The one stream: everything is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)

    def synchronize(self) -> None:
        recorder.wait("Stream.synchronize")

    def wait_stream(self, other: Any) -> None:
        pass

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> Event:
        return event or Event()


class Event:
    """A mark in the stream."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    wait = record

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        recorder.wait("Event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def patches(devices: int) -> dict[str, Any]:
    """Return what takes the place of attributes of `torch.cuda`, by name."""
    current = 0

    def index_of(device: Any = None) -> int:
        if device is None:
            return current
        index = device if isinstance(device, int) else torch.device(device).index
        return current if index is None else index

    def set_device(device: Any) -> None:
        nonlocal current
        if index_of(device) >= devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal ({device})")
        current = index_of(device)

    class DeviceContext(contextlib.AbstractContextManager):
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            self.before = current
            set_device(self.device)

        def __exit__(self, *_: object) -> None:
            set_device(self.before)

    class Properties:
        name, major, minor = NAME, *CAPABILITY
        multi_processor_count, total_memory, is_integrated, gcnArchName = 132, memory.capacity, False, ""

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        return memory.free(index_of(device)), memory.capacity

    def reset_peak(device: Any = None) -> None:
        memory.peak[index_of(device)] = memory.held[index_of(device)]

    def stats(device: Any = None) -> dict[str, int]:
        index = index_of(device)
        return {"allocated_bytes.all.current": memory.held[index], "allocated_bytes.all.peak": memory.peak[index]}

    def held(device: Any = None) -> int:
        return memory.held[index_of(device)]

    def peak(device: Any = None) -> int:
        return memory.peak[index_of(device)]

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return {
        "_lazy_init": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: current,
        "set_device": set_device,
        "device": DeviceContext,
        "synchronize": lambda *_: recorder.wait("torch.cuda.synchronize"),
        "empty_cache": nothing,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: CAPABILITY,
        "get_device_properties": lambda *_: Properties,
        "is_bf16_supported": lambda *_, **__: True,
        "memory_allocated": held,
        "max_memory_allocated": peak,
        "memory_reserved": held,
        "max_memory_reserved": peak,
        "reset_peak_memory_stats": reset_peak,
        "mem_get_info": mem_get_info,
        "memory_stats": stats,
        "Stream": Stream,
        "Event": Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "default_stream": Stream,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": nothing,
        "get_rng_state_all": lambda: [torch.get_rng_state()] * devices,
        "set_rng_state_all": nothing,
    }
