"""Noise that depends on the image, not on the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qdiff.errors import UserError

CALIBRATION_STREAM = 1 << 40
"""Added to a run's seed for calibration images, so none of them is an image of the run."""


class ImageNoise:
    """Standard normal noise that for image i depends only on (seed, i).

    An image's noise does not change with the batch size, the other images of the batch, the number of processes, or the
    point where a killed run resumed. The first draw is for x_T, each later one for one noisy step.

    Every image has its own NumPy Philox stream, drawn on the CPU so that every device gets the same numbers. A
    ``torch.Generator`` on the CPU would not suffice: it keeps only the low 32 bits of its seed, so with hashed seeds
    two of 50,000 images would be identical with probability 1/4.

    Args:
        seed: the run's seed, at least 0.
        indices: the image numbers of this batch, each at least 0, in batch order (N of them).
        shape: shape of one image, usually (C, H, W).
        device, dtype: of the returned noise, which is drawn as float32 and then converted.

    Raises:
        UserError: a seed or index is negative.
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
            raise UserError(f"the seed of the image noise is {seed}; give a seed of at least 0")
        if any(i < 0 for i in indices):
            raise UserError(f"noise was requested for image {min(indices)}; give image numbers of at least 0")
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self.dtype = dtype
        # spawn_key, not entropy=[seed, i]: a seed above 2³² would overflow into the position of the index.
        seeds = [np.random.SeedSequence(seed, spawn_key=(i,)) for i in indices]
        self._streams = [np.random.Generator(np.random.Philox(s)) for s in seeds]

    def draw(self) -> Tensor:
        """Return the next noise of every image, [N, *shape]; consecutive draws are independent."""
        # From pinned memory the copy to a GPU is asynchronous, so the host does not wait for it.
        pinned = self.device.type == "cuda"
        batch = torch.empty((len(self._streams), *self.shape), dtype=torch.float32, pin_memory=pinned)
        rows = batch.numpy()
        for row, stream in enumerate(self._streams):
            rows[row] = stream.standard_normal(self.shape, dtype=np.float32)
        # Converted on the device: converting first would go through memory that is not pinned.
        return batch.to(self.device, non_blocking=True).to(self.dtype)
