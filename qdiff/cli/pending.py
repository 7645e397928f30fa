"""Sample the images that are missing in a run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qdiff.cli.processes import Processes
from qdiff.cli.run_folder import RunFolder
from qdiff.errors import UserError
from qdiff.io.images import to_uint8
from qdiff.io.progress import progress_bar

log = logging.getLogger("qdiff")

SHOWN = 5  # most image numbers in a message


def sample_pending(
    run: RunFolder, sample: Callable[[Sequence[int]], Tensor], batch_size: int, processes: Processes
) -> int:
    """Make and write this process's missing images, batch by batch.

    Args:
        run: the run folder; its existing images are kept.
        sample: ``sample(indices)`` returns the images with these numbers, [N, C, H, W] in [−1, 1].
        batch_size: images per batch.
        processes: image i belongs to process i mod the number of processes.

    Returns:
        The number of images made.

    Raises:
        UserError: an image has values that are not finite. The finite images of its batch are written, and repeating
            the command continues from there.
    """
    pending = run.pending(processes.rank, processes.count)
    damaged = run.damaged(processes.rank, processes.count)
    done = len(range(processes.rank, run.count, processes.count)) - len(pending) - len(damaged)
    made = 0
    with (
        torch.no_grad(),
        progress_bar(
            total=done + len(pending) + len(damaged),
            initial=done,
            desc="sampling",
            unit="img",
            disable=not processes.is_first,
        ) as bar,
    ):
        wanted = sorted(pending + damaged)
        while wanted:
            known = run.image_shape
            if damaged:
                log.warning("images that are damaged or have another size are made again: %s", _listed(damaged))
            for start in range(0, len(wanted), batch_size):
                indices = wanted[start : start + batch_size]
                _save(run, indices, sample(indices))
                bar.update(len(indices))
            made += len(wanted)
            # If the manifest did not record the shape of the run's images, it is known only now.
            wanted = damaged = [] if run.image_shape == known else run.damaged(processes.rank, processes.count)
    return made


def _save(run: RunFolder, indices: Sequence[int], images: Tensor) -> None:
    """Write the images whose values are all finite.

    Raises:
        UserError: an image has values that are not finite; it would be black.
    """
    finite = images.isfinite().flatten(1).all(dim=1)
    good = [index for index, is_good in zip(indices, finite.tolist(), strict=True) if is_good]
    if good:
        run.save_images(good, to_uint8(images[finite]))
    if len(good) < len(indices):
        bad = [index for index in indices if index not in good]
        for index in bad:  # leave no damaged file that could be mistaken for an image
            run.image_path(index).unlink(missing_ok=True)
        raise UserError(
            f"image {_listed(bad)} has values that are not finite and would be black; if half precision overflows, "
            "give --precision full, otherwise check the weights"
        )


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:SHOWN])) + ("" if len(indices) <= SHOWN else f" and {len(indices) - SHOWN} more")
