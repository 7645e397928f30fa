"""Show results beside each other: a markdown table and a picture of the same images from every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qdiff.images import grid, load_png

SHOWN = 24
COLUMNS = 8
PANELS_ACROSS = 4
_HEADER = ("", "FID ↓", "IS ↑", "KID ↓", "asked ↑", "ε error ↓", "size", "calibration", "sampling")
_ASKED = _HEADER.index("asked ↑")


def markdown(rows: list[dict[str, Any]], header: bool = True) -> str:
    """Return table rows as markdown.

    Args:
        rows: as `qdiff.cli.table.TableRun` measures them. The column "asked" (in percent) is there if any of
            them has an ``asked_share``.
        header: put the header line above.
    """
    conditional = any(row.get("asked_share") is not None for row in rows)

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        return (
            row["label"],
            f"{row['fid']:.2f}",
            f"{row['isc']:.2f} ± {row['isc_std']:.2f}",
            f"{row['kid']:.4f}",
            "–" if row.get("asked_share") is None else f"{100 * row['asked_share']:.1f} %",
            "–" if row["noise_mse"] is None else f"{row['noise_mse']:.2e}",
            f"{row['bytes'] / 1e6:.2f} MB",
            f"{row['calibration_s']:.0f} s" if row["calibration_s"] else "–",
            f"{row['sampling_s']:.0f} s",
        )

    lines = [cells(row) for row in rows]
    if header:
        lines = [_HEADER, tuple("---" for _ in _HEADER), *lines]
    if not conditional:
        lines = [line[:_ASKED] + line[_ASKED + 1 :] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
