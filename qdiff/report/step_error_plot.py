"""A plot of the error of ε at every sampling step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from qdiff.io.files import written_whole
from qdiff.report.figures import our_style

_SIZE = (6.4, 3.4)  # inches
_DPI = 160
_TICKS = 12  # at most
# Okabe and Ito's colours can be told apart with any colour vision, and the dashes in print.
_LINES = (("#D55E00", "-"), ("#E69F00", (0, (4, 2))), ("#0072B2", "-"), ("#555555", (0, (1, 1.5))))


def step_error_picture(
    errors: Mapping[str, Sequence[float]], timesteps: Sequence[float], path: str | Path, title: str
) -> None:
    """Write a PNG with one line per variant.

    Args:
        errors: variant → mean squared difference of ε from float at each of the T calls.
        timesteps: timesteps of the T calls, noisiest first, as labels of the horizontal axis.
        path: the PNG file; the write is atomic.
        title: the plot's title.
    """
    with our_style():
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        axis = figure.add_subplot()
        axis.set_yscale("log")
        for number, (name, values) in enumerate(errors.items()):
            colour, dashes = _LINES[number % len(_LINES)]
            axis.plot(range(len(values)), values, color=colour, linestyle=dashes, linewidth=1.6, label=name)
        marked = range(0, len(timesteps), -(-len(timesteps) // _TICKS))
        axis.set_xticks(marked, [f"{timesteps[i]:.4g}" for i in marked])
        axis.set_xlabel("timestep t of the network's call, in sampling order")
        axis.set_ylabel("mean squared error of ε against float")
        axis.set_title(title, fontsize="medium")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        with written_whole(path) as temporary:
            figure.savefig(temporary, format="png")
