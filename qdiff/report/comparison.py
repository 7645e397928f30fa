"""A picture of the same images from every run, next to each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qdiff.io.images import grid, load_png

SHOWN = 24
COLUMNS = 8
PANELS_ACROSS = 4


def comparison_picture(folders: list[tuple[str, Path]], path: Path) -> None:
    """Write a PNG with the first images of every run under its label; image i shares its noise across runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    across = min(len(folders), PANELS_ACROSS)
    down = -(-len(folders) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(4 * across, 2.0 * down), squeeze=False)
    try:
        for axis in axes.flat[len(folders) :]:
            axis.axis("off")
        for axis, (label, folder) in zip(axes.flat, folders, strict=False):
            files = sorted(folder.glob("*.png"))[:SHOWN]
            picture = grid(np.stack([load_png(f) for f in files]), columns=COLUMNS)
            axis.imshow(picture.squeeze(), cmap="gray" if picture.shape[-1] == 1 else None, vmin=0, vmax=255)
            axis.set_title(label, fontsize=11)
            axis.axis("off")
        figure.tight_layout()
        figure.savefig(path, dpi=130, format="png")
    finally:
        pyplot.close(figure)
