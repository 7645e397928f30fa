"""Calls of ``F.scaled_dot_product_attention`` inside any module, routed to `AttentionCore`s that can be quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qdiff.interface import AttentionCore

CORE = "attention_core"


def core_name(number: int) -> str:
    """Return the name of the submodule that computes a module's attention call with this number."""
    return f"{CORE}_{number}"


def route_attention(network: nn.Module, calls: Mapping[str, int]) -> None:
    """Give modules an `AttentionCore` for each attention call of their forwards, in place.

    The cores are ordinary submodules (``attention_core_0``, …), so they are replaced and calibrated like those of a
    network that was written with them. Hooks do the routing; they are functions of this file, so the network can be
    copied and pickled.

    Args:
        calls: number of calls that a module's own forward makes, by module name (`NetworkTrace.attention`).
    """
    for name, count in calls.items():
        module = network.get_submodule(name)
        if hasattr(module, core_name(0)):
            continue
        for number in range(count):
            module.add_module(core_name(number), AttentionCore())
        module.register_forward_pre_hook(_begin_routing)
        module.register_forward_hook(_end_routing, always_call=True)


def routed_calls(network: nn.Module) -> dict[str, int]:
    """Return the number of routed attention calls per module; the inverse of `route_attention`."""
    calls: dict[str, int] = {}
    for name, _ in network.named_modules():
        parent, _, last = name.rpartition(".")
        if last.startswith(f"{CORE}_"):
            calls[parent] = calls.get(parent, 0) + 1
    return calls


class _Routing(TorchFunctionMode):
    """Passes the attention calls of one forward of a module to its cores, in order."""

    in_a_core = False  # a core's own call is not routed again, by the modules around this one

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.number = module, 0

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        if function is not F.scaled_dot_product_attention or _Routing.in_a_core:
            return function(*args, **(kwargs or {}))
        core = getattr(self.module, core_name(self.number), None)
        if core is None:
            raise RuntimeError(f"attention call {self.number} of {type(self.module).__name__} was not traced")
        self.number += 1
        _Routing.in_a_core = True
        try:
            return _call_core(core, *args, **(kwargs or {}))
        finally:
            _Routing.in_a_core = False


def _call_core(
    core: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call an `AttentionCore` with an attention call's arguments; heads that share a key get copies of it."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    core.causal, core.scale = is_causal, scale
    if attn_mask is None:
        return core(query, key, value)
    # Calibration keeps a leaf's inputs by sample, so the mask gets a row per sample.
    mask = attn_mask.reshape(*[1] * (query.dim() - attn_mask.dim()), *attn_mask.shape)
    return core(query, key, value, mask.expand(len(query), *mask.shape[1:]))


_OPEN: dict[int, list[_Routing]] = {}  # by module identity: a module may be called inside itself


def _begin_routing(module: nn.Module, _: tuple) -> None:
    routing = _Routing(module)
    routing.__enter__()
    _OPEN.setdefault(id(module), []).append(routing)


def _end_routing(module: nn.Module, _: tuple, __: Any) -> None:
    routings = _OPEN[id(module)]
    routings.pop().__exit__(None, None, None)
    if not routings:
        del _OPEN[id(module)]


class CallCounter(TorchFunctionMode):
    """Counts, per innermost running module, attention calls and products of two activations.

    Attributes:
        attention: calls of ``F.scaled_dot_product_attention``, by module name.
        products: names of modules that multiply two computed tensors by themselves, which cannot be quantized.
    """

    PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__")

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.attention: dict[str, int] = {}
        self.products: set[str] = set()
        self._running: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        where = self._running[-1] if self._running else ""
        if function is F.scaled_dot_product_attention:
            self.attention[where] = self.attention.get(where, 0) + 1
        elif getattr(function, "__name__", "") in self.PRODUCTS:
            operands = [a for a in args if isinstance(a, Tensor)]
            if len(operands) >= 2 and not any(isinstance(o, nn.Parameter) for o in operands):
                self.products.add(where)
        return function(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def counting(self) -> Iterator[CallCounter]:
        """Count the calls of the forwards that run inside the block."""
        handles = []
        for name, module in self.network.named_modules():
            handles.append(module.register_forward_pre_hook(lambda _, __, name=name: self._running.append(name)))
            handles.append(
                module.register_forward_hook(lambda _, __, ___: (self._running.pop(), None)[1], always_call=True)
            )
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()
