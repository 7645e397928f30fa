"""The range search of EDA-DM: thresholds where one number decides, else every width with every zero point.

The plain two-dimensional search quantizes the tensor 100·2^b times. Here a score of every pair comes from tables, and
only the pairs with the best scores are tried on the tensor. For a step size δ the error of a window [lo, hi] =
[−zδ, (2^b−1−z)δ] is a sum of three parts, because where x falls on the grid of δ does not depend on z:

    Σ_{x<lo} (lo − x)^p  +  Σ_{x>hi} (x − hi)^p  +  Σ_{lo≤x≤hi} |x − δ·round(x/δ)|^p

The first two are functions of one number, tabulated once a row (a histogram convolved with d^p); the third is a
difference of two prefix sums over the sorted values, one array a step size.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.functional import max_level
from qdiff.ranges.errors import CACHED_VALUES, DEVICE_BYTES, ERROR_NORM, first_least, pick, values_at_a_time
from qdiff.ranges.qparams import TINY, affine

STEPS = 100
SHORTLIST = 32  # pairs tried on the tensor; tests compare the outcome with trying them all
CELLS = 4096  # of the tables over a row's range: 16 a step of an 8-bit quantizer
BLOCK = 8  # sorted values that share an entry of the prefix sums, where there are many
CACHED_ROWS = 32  # each has a score for every pair
# What a row takes for each pair that is scored, each cell of its tables, and each value with its 100 prefix sums.
PAIR_BYTES, CELL_BYTES, VALUE_BYTES = 56, 128, 128
DENSE_BITS = 8  # up to here every zero point is scored


class Side(Enum):
    """On which side of 0 the data lie: the factors of a threshold that give its range."""

    POSITIVE = (0.0, 1.0)
    NEGATIVE = (-1.0, 0.0)
    BOTH = (-1.0, 1.0)

    @classmethod
    def of(cls, x: Tensor) -> Side:
        """Return the side of a tensor's values, 0 belonging to either."""
        low, high = torch.aminmax(x)
        return cls.POSITIVE if low >= 0 else cls.NEGATIVE if high <= 0 else cls.BOTH


def search_range(rows: Tensor, bits: int, symmetric: bool, side: Side) -> tuple[Tensor, Tensor]:
    """Find the range with the least mean |error|^2.4 of each row (EDA-DM; the first of equals).

    Where data lie on one side of 0, or ``symmetric``: thresholds t = max|x|·i/100 and ranges [0, t], [−t, 0] or
    [−t, t]. Otherwise widths (max − min)·i/100 with every zero point, i = 1 … 100. min and max are widened to include
    0, so that a channel whose values are far from 0 is not clipped away. `affine` turns ranges into δ and z.

    Beyond 8 bits zero points are searched from coarse to fine: 256 of them and those that align an end of the range
    with an extreme, then ever finer around the best one at its width.

    Args:
        rows: [C, n] float32.
        bits: width b.
        symmetric: keep the middle of the levels at 0.
        side: of the whole tensor that the rows belong to.

    Returns:
        low [C] ≤ 0 and high [C] ≥ 0.

    Raises:
        UserError: values that are not finite.
    """
    if not torch.isfinite(rows).all():
        raise UserError("values to quantize are NaN or infinite; check the weights and the calibration data")
    pairs = side is Side.BOTH and not symmetric
    parts = rows.split(_rows_at_a_time(rows.shape[1], bits, rows.device))
    lows, highs = zip(*(_best_pair(p, bits) if pairs else _best_threshold(p, bits, side) for p in parts), strict=True)
    return torch.cat(lows), torch.cat(highs)


def _rows_at_a_time(n: int, bits: int, device: torch.device) -> int:
    """Return how many rows of n values are searched together; results do not depend on it."""
    if device.type == "cpu":
        return min(max(1, CACHED_VALUES // n), CACHED_ROWS)
    pairs = STEPS * (2 ** min(bits, DENSE_BITS) + 4)
    a_row = PAIR_BYTES * pairs + CELL_BYTES * CELLS + VALUE_BYTES * n
    return max(1, DEVICE_BYTES // 2 // a_row)


def _best(rows: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return which of the ranges [C, K] fits each row best, the first of equals: [C]."""
    return first_least(rows, *affine(low, high, bits), bits)


def _best_threshold(rows: Tensor, bits: int, side: Side) -> tuple[Tensor, Tensor]:
    steps = torch.arange(1, STEPS + 1, device=rows.device)
    # Divided first: the golden values are these, to the bit.
    thresholds = rows.abs().amax(dim=1)[:, None] / STEPS * steps
    low, high = (thresholds * factor for factor in side.value)
    return pick(_best(rows, low, high, bits), low, high)


def _window(width: Tensor, step: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the ranges of widths width·step/100 whose zero points are ``zero``."""
    scaled = width / STEPS * step
    delta = scaled / max_level(bits)
    return -zero * delta, scaled - zero * delta


def _best_pair(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = rows.amin(dim=1, keepdim=True).clamp(max=0.0), rows.amax(dim=1, keepdim=True).clamp(min=0.0)
    width = high - low
    zeros = _zero_points(low, high, bits)
    scores = _scores(rows, low, width, zeros, bits).flatten(1)
    # In the order of the plain search, so that the first of equals is the same.
    chosen = scores.topk(min(SHORTLIST, scores.shape[1]), largest=False).indices.sort(dim=1).values
    step = chosen // zeros.shape[2] + 1
    zero = zeros.expand(len(rows), STEPS, -1).flatten(1).gather(1, chosen)
    step, zero = pick(_best(rows, *_window(width, step, zero, bits), bits), step, zero)
    stride = 2 ** max(0, bits - DENSE_BITS)
    while stride > 1:
        finer = max(1, stride // 16)
        around = zero[:, None] + torch.arange(-stride, stride + 1, finer, device=rows.device)
        around = around.clamp(0, max_level(bits))
        (zero,) = pick(_best(rows, *_window(width, step[:, None], around, bits), bits), around)
        stride = finer
    low, high = _window(width, step[:, None], zero[:, None], bits)
    return low[:, 0], high[:, 0]


def _zero_points(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return the zero points to score: [1, 1, Z], or [C, STEPS, Z] where not all can be."""
    zeros = torch.arange(0, 2**bits, 2 ** max(0, bits - DENSE_BITS), device=low.device)[None, None]
    if bits <= DENSE_BITS:
        return zeros
    top = max_level(bits)
    steps = torch.arange(1, STEPS + 1, device=low.device)
    delta = (((high - low) / STEPS * steps) / top).clamp(min=TINY)
    below, above = (-low / delta).clamp(max=top), (high / delta).clamp(max=top)
    aligned = torch.stack([below.floor(), below.ceil(), top - above.floor(), top - above.ceil()], dim=2)
    return torch.cat([zeros.expand(*delta.shape, -1), aligned.long()], dim=2)


def _scores(rows: Tensor, low: Tensor, width: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """Approximate Σ |error|^p of every pair, in units of the row's width: [C, STEPS, Z]."""
    count, n = rows.shape
    width = width.clamp(min=torch.finfo(rows.dtype).tiny)
    ordered, origin = ((rows - low) / width).sort(dim=1).values, -low / width  # 0 … 1
    below, above, rank = (table[:, None] for table in _tables(ordered))

    share = torch.arange(1, STEPS + 1, device=rows.device, dtype=rows.dtype)[None, :, None] / STEPS
    delta = share / max_level(bits)
    start = origin[:, :, None] - zeros * delta
    start, end = start.clamp(0, 1) * CELLS, (start + share).clamp(0, 1) * CELLS
    clipped = _read(below, start) + _read(above, end)

    block = max(1, min(BLOCK, n // 512))
    # Padding lies on the grid of every δ: it adds nothing.
    blocks = torch.nn.functional.pad(ordered - origin, (0, -n % block)).reshape(count, -1, block).mT.contiguous()
    prefix = blocks.new_zeros(count, STEPS, blocks.shape[2] + 1)
    at_a_time = max(1, values_at_a_time(rows.device) // blocks.numel())
    for some, out in zip(delta[0].split(at_a_time), prefix[:, :, 1:].split(at_a_time, 1), strict=True):
        levels = blocks[:, None] / some[:, :, None]
        error = levels.sub_(levels.round()).abs_().pow_(ERROR_NORM).sum(dim=2)
        torch.cumsum(error, dim=2, out=out)
    inside = _read(prefix, _read(rank, end) / block) - _read(prefix, _read(rank, start) / block)
    return clipped + inside * delta**ERROR_NORM


def _tables(ordered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_{x<g} (g−x)^p, Σ_{x>g} (x−g)^p and the number of x < g at CELLS + 1 places g of [0, 1], each [C, CELLS + 1]."""
    place = ordered.double() * CELLS
    cell = place.floor().clamp(max=CELLS - 1)
    share = place - cell
    mass = place.new_zeros(len(ordered), CELLS + 1)
    mass.scatter_add_(1, cell.long(), 1 - share).scatter_add_(1, cell.long() + 1, share)
    grid = torch.arange(CELLS + 1, device=ordered.device) / CELLS
    size = 2 * CELLS + 2
    kernel = torch.fft.rfft(grid.double() ** ERROR_NORM, size)
    both = torch.stack([mass, mass.flip(1)])
    below, above = torch.fft.irfft(torch.fft.rfft(both, size) * kernel, size)[..., : CELLS + 1].float()
    rank = torch.searchsorted(ordered, grid.expand(len(ordered), -1).contiguous()).float()
    return below, above.flip(1), rank


def _read(table: Tensor, where: Tensor) -> Tensor:
    """Interpolate a table [C, 1 or STEPS, M] at ``where`` [C, STEPS, Z], in units of its last dimension."""
    cell = where.long().clamp_(0, table.shape[2] - 2)
    table = table.expand(-1, where.shape[1], -1)
    return torch.lerp(table.gather(2, cell), table.gather(2, cell + 1), where - cell)
