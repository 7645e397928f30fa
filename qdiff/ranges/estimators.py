"""Registry of range estimators. To add one, write a file here with a class, and add a row below.

estimate(weight, bits=4, method="mse", symmetric=False, per_channel=True)
"""

from __future__ import annotations

from torch import Tensor

from qdiff.ranges.grid_search import GridSearch
from qdiff.ranges.least_error import LeastError, QuickLeastError
from qdiff.ranges.min_max import MinMax
from qdiff.ranges.moving_average import MovingAverage
from qdiff.ranges.range_estimator import RangeEstimator


class RangeMethod:
    """Names of the estimators that the papers' recipes use."""

    MIN_MAX = "max"
    MSE = "mse"
    SEARCH = "search"  # EDA-DM's
    AVERAGE = "ema"  # TFMQ-DM's
    QUICK = "quick"  # GRIP's


ESTIMATORS: dict[str, type[RangeEstimator]] = {
    RangeMethod.MIN_MAX: MinMax,
    RangeMethod.MSE: LeastError,
    RangeMethod.SEARCH: GridSearch,
    RangeMethod.AVERAGE: MovingAverage,
    RangeMethod.QUICK: QuickLeastError,
}
"""The estimators by their name in ``--w_range``, ``--a_range``, `QuantConfig` and checkpoints."""


def estimate(
    x: Tensor,
    bits: int,
    method: str,
    symmetric: bool,
    unsigned: bool = False,
    per_channel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose δ and z for a tensor.

    Args:
        x: the values; with ``per_channel`` every index of dimension 0 gets its own range.
        bits, symmetric, unsigned: see `qdiff.ranges.qparams.qparams`.
        method: a name in `ESTIMATORS`.

    Returns:
        δ and z of shape () or, per channel, [C, 1, …] to broadcast against x.
    """
    rows = x.detach().reshape(x.shape[0] if per_channel else 1, -1).float()
    delta, zero_point = ESTIMATORS[method].choose(rows, rows.amin(dim=1), rows.amax(dim=1), bits, symmetric, unsigned)
    shape = [-1] + [1] * (x.dim() - 1) if per_channel else []
    return delta.reshape(shape), zero_point.reshape(shape)
