"""Record what a sampler feeds the denoising network: the calibration set of a float model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NoisePrediction = Callable[[Tensor, Tensor], Tensor]


def record_calls(
    sample: Callable[[NoisePrediction, Sequence[int]], object],
    eps: NoisePrediction,
    count: int,
    batch_size: int,
    keep: Sequence[int],
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Run a sampler batch by batch and keep the network inputs of chosen calls.

    Args:
        sample: ``sample(eps, indices)`` runs the whole sampler for the images numbered ``indices``.
        eps: the float network, (x [N, C, H, W], t [N]) → [N, C, H, W].
        count: how many images to sample.
        batch_size: images at a time.
        keep: which calls of a run to keep, counted from 0 (the noisiest).
        on_batch: told the number of images of each finished batch.

    Returns:
        ``xs`` float32 [len(keep), count, C, H, W] and ``ts`` [len(keep), count], on the CPU.
    """
    kept: dict[str, list[list[Tensor]]] = {"xs": [[] for _ in keep], "ts": [[] for _ in keep]}
    place = {call: row for row, call in enumerate(keep)}
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        call = 0

        def recording(x: Tensor, t: Tensor) -> Tensor:
            nonlocal call
            if call in place:
                kept["xs"][place[call]].append(x.detach().float().cpu().clone())
                kept["ts"][place[call]].append(t.detach().cpu().clone())
            call += 1
            return eps(x, t)

        sample(recording, indices)
        if on_batch is not None:
            on_batch(len(indices))
    return {key: torch.stack([torch.cat(parts) for parts in rows]) for key, rows in kept.items()}
