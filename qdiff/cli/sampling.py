"""Sample the images that a run folder still lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qdiff.cli.run_folder import RunFolder
from qdiff.cli.runtime import Processes
from qdiff.errors import UserError
from qdiff.images import to_uint8
from qdiff.progress import progress_bar


def sample_pending(
    run: RunFolder, sample: Callable[[Sequence[int]], Tensor], batch_size: int, processes: Processes
) -> int:
    """Make and write this process's missing images, a batch at a time.

    Args:
        run: where they go; images that are there already are not made again.
        sample: ``sample(indices)`` returns the images of those numbers, [N, C, H, W] in [−1, 1].
        batch_size: images at a time.
        processes: image i belongs to process i mod their number.

    Returns:
        How many images were made.
    """
    pending = run.pending(processes.rank, processes.count)
    done = len(range(processes.rank, run.count, processes.count)) - len(pending)
    with (
        torch.no_grad(),
        progress_bar(
            total=done + len(pending),
            initial=done,
            desc="sampling",
            unit="img",
            disable=not processes.is_first,
        ) as bar,
    ):
        for start in range(0, len(pending), batch_size):
            indices = pending[start : start + batch_size]
            run.save_images(indices, to_uint8(_finite(sample(indices), indices)))
            bar.update(len(indices))
    return len(pending)


def _finite(images: Tensor, indices: Sequence[int]) -> Tensor:
    """Return the images.

    Raises:
        UserError: one has a value that is not finite, which a file would show as black.
    """
    finite = images.isfinite().flatten(1).all(dim=1).tolist()
    if not all(finite):
        number = indices[finite.index(False)]
        raise UserError(
            f"image {number} has values that are not finite and would be black; if half precision overflows, give "
            "--precision full, else look at the weights"
        )
    return images
