"""A picture of the same images from every run, next to each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qdiff.io.images import grid, load_png

SHOWN = 24
COLUMNS = 8
PANELS_ACROSS = 4


def comparison_picture(folders: list[tuple[str, Path]], path: Path) -> None:
    """Write a PNG with the first images of every run under its label; image i shares its noise across runs.

    Args:
        folders: label and folder with images, per run; runs without images are left out.
        path: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = {label: sorted(folder.glob("*.png"))[:SHOWN] for label, folder in folders}
    files = {label: some for label, some in files.items() if some}
    across = min(len(files), PANELS_ACROSS)
    down = -(-len(files) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(4 * across, 2.0 * down), squeeze=False)
    try:
        for axis in axes.flat[len(files) :]:
            axis.axis("off")
        for axis, (label, some) in zip(axes.flat, files.items(), strict=False):
            picture = grid(np.stack([load_png(f) for f in some]), columns=COLUMNS)
            axis.imshow(picture.squeeze(), cmap="gray" if picture.shape[-1] == 1 else None, vmin=0, vmax=255)
            axis.set_title(label, fontsize=11)
            axis.axis("off")
        figure.tight_layout()
        figure.savefig(path, dpi=130, format="png")
    finally:
        pyplot.close(figure)
