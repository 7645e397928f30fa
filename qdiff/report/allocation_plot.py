"""A plot of how calibration samples are distributed over the steps, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from qdiff.calibration.tdac import Allocation, normalised
from qdiff.io.files import written_whole
from qdiff.report.figures import our_style

_SIZE = (6.4, 3.2)  # inches
_DPI = 160
_TICKS = 12  # at most
# Okabe and Ito's colours can be told apart with any colour vision, and the dashes in print.
_BARS = "#B9C4CC"
_LINES = (("density", "#0072B2", "-"), ("variety", "#D55E00", (0, (4, 2))))


def allocation_picture(allocation: Allocation, path: str | Path, steps: Sequence[float]) -> None:
    """Write a PNG with one bar per step for its number of samples, and lines for the two measures that decide it.

    Args:
        allocation: allocation over T steps, in sampling order.
        path: the PNG file; folders are created, and the write is atomic.
        steps: the T timesteps of the network's calls, noisiest first, as labels of the horizontal axis.
    """
    total = len(allocation.counts)
    if len(steps) != total:
        raise ValueError(f"{len(steps)} timesteps for an allocation over {total} steps")
    with our_style():
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        axis = figure.add_subplot()
        places = range(total)
        bars = axis.bar(places, allocation.counts.tolist(), width=0.85, color=_BARS, label="samples")
        axis.set_ylabel(f"samples per step ({int(allocation.counts.sum())} in total)")
        axis.set_xlabel("timestep t of the network's call, in sampling order")
        # Labels are at evenly spaced calls; their timesteps need not be even (quadratic spacing).
        marked = range(0, total, -(-total // _TICKS))
        axis.set_xticks(marked, [f"{float(steps[i]):.4g}" for i in marked])
        axis.set_xlim(-0.5 - 0.01 * total, total - 0.5 + 0.01 * total)
        axis.set_ylim(0, 1.05 * max(1, int(allocation.counts.max())))
        axis.yaxis.get_major_locator().set_params(integer=True)
        measures = axis.twinx()
        measures.set_ylabel("density and variety, normalised")
        measures.set_ylim(0, 1.05)
        marker = "o" if total <= 3 else None  # too few points for a line
        drawn = [
            measures.plot(
                places,
                normalised(getattr(allocation, name)).tolist(),
                color=colour,
                linestyle=dashes,
                linewidth=1.5,
                marker=marker,
                label=name,
            )[0]
            for name, colour, dashes in _LINES
        ]
        for each in (axis, measures):
            each.spines["top"].set_visible(False)
        figure.legend(handles=[bars, *drawn], loc="outside upper center", ncols=3, frameon=False)
        with written_whole(path) as temporary:
            figure.savefig(temporary, format="png")
