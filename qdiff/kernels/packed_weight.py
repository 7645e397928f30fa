"""Weights that stay packed while a network runs: a layer's integers packed at their width, and a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.kernels.packing import packed_bytes, unpack

PACKED = "this network is packed (QuantModel.pack_weights) and holds no float weights"


class WeightCache:
    """Dequantized weights of the layers that share it, up to a limit; the least recently used are dropped first.

    A sampler calls the layers in turn, again and again. Plain LRU would always drop the weight that is needed next, and
    nothing would ever be found. Therefore a weight stays until a whole round of calls has passed without it.

    Args:
        limit: bytes; 0 keeps nothing.
    """

    def __init__(self, limit: int = 0) -> None:
        if limit < 0:
            raise UserError(f"the cache of dequantized weights is {limit} bytes; give 0 or more")
        self.limit = limit
        self.held = self.hits = self.misses = 0
        self._weights: OrderedDict[int, Tensor] = OrderedDict()  # least recently used first
        self._last_use: dict[int, int] = {}  # of every layer that ever used the cache
        self._now = 0

    def get(self, owner: object, make: Callable[[], Tensor]) -> Tensor:
        """Return a layer's weight, from the cache or from ``make``."""
        if self.limit == 0:
            return make()
        key = id(owner)
        self._now += 1
        before, self._last_use[key] = self._last_use.get(key, 0), self._now
        weight = self._weights.get(key)
        if weight is not None:
            self.hits += 1
            self._weights.move_to_end(key)
            return weight
        self.misses += 1
        weight = make()
        if self._makes_room(_bytes(weight), before):
            self._weights[key] = weight
            self.held += _bytes(weight)
        return weight

    def _makes_room(self, size: int, before: int) -> bool:
        """Drop weights that were not used since ``before``, as many as needed; none if dropping all is not enough."""
        leaving, free = [], self.limit - self.held
        for key, weight in self._weights.items():
            if free >= size or self._last_use[key] > before:
                break
            leaving.append(key)
            free += _bytes(weight)
        if free < size:
            return False
        for key in leaving:
            self.held -= _bytes(self._weights.pop(key))
        return True

    def clear(self) -> None:
        """Drop all weights, e.g. when the layers move to another device."""
        self._weights.clear()
        self.held = 0

    def __deepcopy__(self, memo: dict) -> WeightCache:
        """Return an empty cache, because the copy belongs to other layers."""
        return WeightCache(self.limit)

    def __reduce__(self) -> tuple:
        """Pickle an empty cache: its keys identify objects of this process."""
        return WeightCache, (self.limit,)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class PackedWeight(nn.Module):
    """A layer's quantized weight as a bit stream (`qdiff.kernels.packing`).

    Args:
        stream: uint8 [⌈numel·bits/8⌉].
        bits: width of the integers.
        shape: shape of the weight.
    """

    def __init__(self, stream: Tensor, bits: int, shape: torch.Size) -> None:
        super().__init__()
        if stream.numel() != packed_bytes(shape.numel(), bits):
            raise ValueError(f"{stream.numel()} bytes cannot hold {shape.numel()} weights of {bits} bits")
        self.bits, self.shape = bits, shape
        self.cache = WeightCache()
        self.multiplies_integers = False
        self.register_buffer("stream", stream)

    def integers(self) -> Tensor:
        """Return the integers as uint8, in the weight's shape; at 8 bits without a copy."""
        return unpack(self.stream, self.bits, self.shape.numel()).view(self.shape)

    def cached(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the dequantized weight that ``make`` computes, from the shared cache if possible."""
        return self.cache.get(self, make)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.cache.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True) -> PackedWeight:
        self.cache.clear()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, bits={self.bits}"
