"""Noise that belongs to an image, not to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qdiff.errors import UserError

CALIBRATION_STREAM = 1 << 40
"""Added to a run's seed for calibration images: no image of the run is among them."""


class ImageNoise:
    """Standard normal noise in which image i depends on (seed, i) alone.

    Batch size, the other images of the batch, the number of processes and the place where a killed run
    resumed all leave an image's noise as it is. The first draw is meant for x_T, each later one for one noisy
    step.

    Every image has a NumPy Philox stream of its own, drawn on the CPU so that every device gets the same
    numbers. A ``torch.Generator`` on the CPU would not do: it keeps only the low 32 bits of its seed, so that
    with hashed seeds two of 50,000 images would be one and the same with probability 1/4.

    Args:
        seed: the run's seed, at least 0.
        indices: the image numbers of this batch, each at least 0, in batch order (N of them).
        shape: shape of one image, usually (C, H, W).
        device, dtype: where the draws go. They are drawn as float32 and then converted.

    Raises:
        UserError: a negative seed or index.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        indices = [int(i) for i in indices]
        if seed < 0:
            raise UserError(f"the seed of the image noise is {seed}: give a seed of at least 0")
        if any(i < 0 for i in indices):
            raise UserError(f"the image noise was asked for image {min(indices)}: image numbers start at 0")
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self.dtype = dtype
        # spawn_key and not entropy=[seed, i]: a seed above 2³² would spill into the place of the index.
        seeds = [np.random.SeedSequence(seed, spawn_key=(i,)) for i in indices]
        self._streams = [np.random.Generator(np.random.Philox(s)) for s in seeds]

    def draw(self) -> Tensor:
        """Return the next noise of every image, [N, *shape]; consecutive draws are independent."""
        # From pinned memory the copy to a GPU runs beside what the GPU does: the host does not wait for it.
        pinned = self.device.type == "cuda"
        batch = torch.empty((len(self._streams), *self.shape), dtype=torch.float32, pin_memory=pinned)
        rows = batch.numpy()
        for row, stream in enumerate(self._streams):
            rows[row] = stream.standard_normal(self.shape, dtype=np.float32)
        # Converted on the device: a conversion on the way would go through memory that is not pinned.
        return batch.to(self.device, non_blocking=True).to(self.dtype)
