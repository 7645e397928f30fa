"""Record what a sampler feeds the denoising network: the calibration set of a float model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class OnCall(Protocol):
    """Told of every network call of a sampling run, before guidance doubles the batch."""

    def __call__(
        self, x: Tensor, t: Tensor, condition: Tensor | None = None, unconditional: Tensor | None = None
    ) -> None:
        """x [N, C, H, W], t [N]; where conditional [N, L, D], and the same where guidance uses "no condition"."""


def record_calls(
    sample: Callable[[OnCall, Sequence[int]], object],
    count: int,
    batch_size: int,
    keep: Sequence[int],
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Run a sampler batch by batch and keep the network inputs of chosen calls.

    Args:
        sample: ``sample(on_call, indices)`` runs the whole sampler for the images numbered ``indices``.
        count: how many images to sample.
        batch_size: images at a time.
        keep: which calls of a run to keep, counted from 0 (the noisiest).
        on_batch: told the number of images of each finished batch.

    Returns:
        ``xs`` float32 [len(keep), count, C, H, W], ``ts`` [len(keep), count] and, where there are conditions, ``cs``
        and ``ucs`` [len(keep), count, L, D], on the CPU.
    """
    place = {call: row for row, call in enumerate(keep)}
    kept: dict[str, list[list[Tensor]]] = {}
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        call = 0

        def on_call(x: Tensor, t: Tensor, condition: Tensor | None = None, unconditional: Tensor | None = None) -> None:
            nonlocal call
            if call in place:
                given = {"xs": x.float(), "ts": t, "cs": condition, "ucs": unconditional}
                for key, value in given.items():
                    if value is not None:
                        rows = kept.setdefault(key, [[] for _ in keep])
                        rows[place[call]].append(value.detach().cpu().clone())
            call += 1

        sample(on_call, indices)
        if on_batch is not None:
            on_batch(len(indices))
    return {key: torch.stack([torch.cat(parts) for parts in rows]) for key, rows in kept.items()}
