"""Calls of ``F.scaled_dot_product_attention`` inside any module, routed to `AttentionCore`s that can be quantized."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qdiff.errors import UserError
from qdiff.interface import AttentionCore

_ATTENTION = F.scaled_dot_product_attention  # as modules call it, also where a name in torch was replaced later
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


class _Open(threading.local):
    """The routings of the forwards that are running in this thread, innermost last; None while a core computes."""

    def __init__(self) -> None:
        self.routings: list[_Routing | None] = []


_open = _Open()


class _Routing(TorchFunctionMode):
    """Passes the attention calls of one forward of a module to its cores, in order."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.number, self.computes = module, 0, True

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        # Modes of outer modules see the calls of inner ones, and the call that a core makes itself.
        if function is not _ATTENTION or _open.routings[-1] is not self:
            return function(*args, **(kwargs or {}))
        core = getattr(self.module, core_name(self.number), None)
        if core is None:
            raise _changed(self.module, f"more than the {self.number} attention calls that were quantized")
        self.number += 1
        _open.routings.append(None)
        try:
            return _call_core(core, *args, **(kwargs or {}))
        finally:
            _open.routings.pop()


def _changed(module: nn.Module, what: str) -> UserError:
    return UserError(
        f"a module of type {type(module).__name__} now makes {what}; run it as it was when it was quantized, with the "
        "same attention processor"
    )


def skip_attention(module: nn.Module) -> None:
    """Expect no attention calls in the running forward of a module, because its output is taken from elsewhere."""
    if _open.routings and _open.routings[-1] is not None and _open.routings[-1].module is module:
        _open.routings[-1].computes = False


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
    # Not len(query), which would fix the size of the batch in an exported graph.
    return core(query, key, value, mask.expand(query.shape[0], *mask.shape[1:]))


def _begin_routing(module: nn.Module, _: tuple) -> None:
    routing = _Routing(module)
    routing.__enter__()
    _open.routings.append(routing)


def _end_routing(module: nn.Module, _: tuple, output: Any) -> None:
    routing = _open.routings.pop()
    routing.__exit__(None, None, None)
    # After an error there is no output, and that error is the one to show.
    if routing.computes and output is not None and hasattr(module, core_name(routing.number)):
        raise _changed(module, f"only {routing.number} of the attention calls that were quantized")


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
        if function is _ATTENTION:
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
