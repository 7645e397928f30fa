"""Move the samples of a unit's batches to the module's device without making the host wait for the GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

Samples = tuple[Tensor, ...]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a small tensor in RAM on a device; the host does not wait for a copy to a GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    # From pageable memory, the copy would wait for the kernels that the GPU still has to run. The allocator of
    # page-locked memory reuses a block only after the copies from it are done.
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Feeding:
    """The device where a unit is fitted, and how many samples move there at a time.

    Attributes:
        device: the device of the unit's module.
        pass_size: samples per forward and backward pass; None takes whole batches.
        resident_bytes: GPU memory that a unit's samples may occupy; larger sets are moved batch by batch.
    """

    device: torch.device
    pass_size: int | None = None
    resident_bytes: int = 0

    def passes(self, tensors: Sequence[Tensor], batches: Tensor) -> Iterator[Samples]:
        """Yield the samples of one pass after another; `pass_counts` gives the passes of a batch.

        If all samples fit on the GPU, they are moved there once. Otherwise a thread gathers the next pass into
        page-locked memory during the current one, and the copy to the GPU is asynchronous.

        Args:
            tensors: each [N, …], on the device or in RAM.
            batches: rows [iterations, batch], int64, in RAM.
        """
        if self.device.type == "cpu":
            return _gathered(tensors, self._parts(batches))
        if _bytes_to_move(tensors, self.device) <= self.resident_bytes:
            moved = {id(t): t.to(self.device) for t in tensors}  # the same tensor may occur twice
            rows = batches.to(self.device)  # an index in RAM would be copied at every use
            return _gathered([moved[id(t)] for t in tensors], self._parts(rows))
        return _prefetched(tensors, self._parts(batches), self.device)

    def pass_counts(self, batch_size: int) -> list[int]:
        """Return the number of samples in each pass of a batch."""
        size = self.pass_size or batch_size
        return [min(size, batch_size - start) for start in range(0, batch_size, size)]

    def _parts(self, batches: Tensor) -> Iterator[Tensor]:
        for batch in batches:
            yield from batch.split(self.pass_size or len(batch))


def _bytes_to_move(tensors: Iterable[Tensor], device: torch.device) -> int:
    elsewhere = {id(t): t for t in tensors if t.device != device}
    return sum(t.numel() * t.element_size() for t in elsewhere.values())


def _gathered(tensors: Sequence[Tensor], parts: Iterable[Tensor]) -> Iterator[Samples]:
    for rows in parts:
        yield tuple(t[rows] for t in tensors)


def _prefetched(tensors: Sequence[Tensor], parts: Iterable[Tensor], device: torch.device) -> Iterator[Samples]:
    def gather(rows: Tensor, into: Samples) -> Samples:
        for tensor, place in zip(tensors, into, strict=True):
            torch.index_select(tensor, 0, rows, out=place)
        return into

    def begin(rows: Tensor) -> Future[Samples]:
        # The allocator of page-locked memory reuses a block only after the copies from it are done.
        places = tuple(torch.empty((len(rows), *t.shape[1:]), dtype=t.dtype, pin_memory=True) for t in tensors)
        return pool.submit(gather, rows, places)

    with ThreadPoolExecutor(1) as pool:
        waiting: Future[Samples] | None = None
        for rows in parts:
            ready, waiting = waiting, begin(rows)
            if ready is not None:
                yield tuple(t.to(device, non_blocking=True) for t in ready.result())
        if waiting is not None:
            yield tuple(t.to(device, non_blocking=True) for t in waiting.result())
