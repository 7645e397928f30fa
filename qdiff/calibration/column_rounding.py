"""Round a weight column by column, so that the columns not yet rounded absorb the error: GPTQ and GPTAQ.

GPTQ: Frantar et al., ICLR 2023 (arXiv 2210.17323), on the update of Optimal Brain Quantization. GPTAQ: Li et al., ICML
2025 (arXiv 2504.02692), whose inputs differ between the float and the quantized network.

Names: W [R, K] the weight, x and x̂ the layer's input in the float and in the quantized network, H = E 2x̂x̂ᵀ,
D = E 2(x − x̂)x̂ᵀ, U the upper triangular factor of H⁻¹ = UᵀU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from qdiff.functional import max_level

BLOCK = 128  # columns between two updates of all the rest; the result is the same for any number
MORE_DAMPING, TRIES = 10.0, 6  # factor by which the damping grows where there is no factor; how often one is looked for


class Target(str, Enum):
    """What the rounded weight V should reproduce from the quantized network's input."""

    CORRECTED = "corrected"  # Wx: GPTQ on W(I + aDH⁻¹), where E|Wx − Vx̂|² is least without rounding
    GPTAQ = "gptaq"  # Wx: GPTAQ's update of the columns not yet rounded
    PLAIN = "plain"  # Wx̂: GPTQ


FACTORS = {Target.CORRECTED: 1.0, Target.GPTAQ: 0.25, Target.PLAIN: 0.0}
"""The factor a of D by default; GPTAQ's paper has 1 and its code 0.25."""


Factor = tuple[Tensor, Tensor]
"""The order in which columns are rounded [K], and U of H with its columns in that order [K, K], float64."""


class NotPositiveDefinite(ArithmeticError):
    """H cannot be factored, however much it is damped."""


@dataclass(frozen=True)
class Grid:
    """The fixed grid of a weight: δ·(q − z) with q in [0, 2^b − 1].

    Attributes:
        delta, zero_point: [R, K], or broadcast to it; columns of different slices have their own.
        bits: width b.
    """

    delta: Tensor
    zero_point: Tensor
    bits: int

    def ordered(self, order: Tensor) -> Grid:
        """Return the grid with its columns in another order."""
        return Grid(self.delta[:, order], self.zero_point[:, order], self.bits)


@torch.no_grad()
def round_matrix(
    weight: Tensor,
    grid: Grid,
    inputs: Tensor,
    cross: Tensor | None = None,
    *,
    target: Target = Target.PLAIN,
    factor: float | None = None,
    damping: float = 0.01,
    block: int = BLOCK,
    ordered: Factor | None = None,
) -> Tensor:
    """Return the integers q [R, K], float64, of one weight.

    Columns are rounded in descending order of H_jj. A column whose input is always 0 is rounded as a weight of 0.

    Args:
        weight: W [R, K].
        grid: δ, z and b.
        inputs, cross: H and D, [K, K]; D is not needed for the plain target.
        target, factor: what to aim for, and a; None takes `FACTORS`.
        damping: added to the diagonal of H, as a share of its mean over the columns that have an input.
        block: columns per block.
        ordered: what `ordered_factors` gives for H and this damping. With it, nothing here makes the host wait for a
            GPU; None computes it.

    Raises:
        NotPositiveDefinite: H has no factor.
    """
    factor = FACTORS[target] if factor is None else factor
    weight, dead = weight.double(), inputs.diagonal() == 0
    order, upper = ordered_factors([inputs], damping)[0] if ordered is None else ordered
    coupling = None
    if target is not Target.PLAIN:
        cross = factor * cross.double()[order][:, order]
        if target is Target.CORRECTED:
            weight = corrected_weight(weight[:, order], cross, upper)[:, order.argsort()]
        else:
            coupling = (cross @ upper.mT).triu_(1) @ upper
    weight = weight.masked_fill(dead, 0.0)[:, order]
    return round_columns(weight, grid.ordered(order), upper, coupling, block)[:, order.argsort()]


def ordered_factors(inputs: Sequence[Tensor], damping: float = 0.01) -> list[Factor]:
    """Return the `Factor` of the moments of every group of a layer; on a GPU, the host waits once for all of them.

    Args:
        inputs: H of each group, [K, K].
        damping: as in `round_matrix`.

    Raises:
        NotPositiveDefinite: some H has no factor.
    """
    orders, matrices, dampings = [], [], []
    for moments in inputs:
        moments = moments.double().clone()
        dead = moments.diagonal() == 0
        strength = moments.diagonal().sum() / (~dead).sum().clamp(min=1)
        moments.diagonal().masked_fill_(dead, 1.0)
        orders.append(moments.diagonal().masked_fill(dead, 0.0).argsort(descending=True, stable=True))
        matrices.append(moments[orders[-1]][:, orders[-1]])
        dampings.append(damping * strength)
    return list(zip(orders, inverse_factors(matrices, dampings), strict=True))


def inverse_factors(matrices: Sequence[Tensor], dampings: Sequence[Tensor]) -> list[Tensor]:
    """Return the upper triangular U with UᵀU = (matrix + damping·I)⁻¹ for every matrix, in float64.

    Args:
        matrices: [K, K], symmetric.
        dampings: of each matrix, shape (); raised up to ``TRIES - 1`` times where rounding errors leave no factor.

    Raises:
        NotPositiveDefinite: some matrix has no factor even so.
    """
    for left in reversed(range(TRIES)):
        uppers, failures = zip(*map(_try_factor, matrices, dampings), strict=True)
        # The one wait for a GPU, in a layer as a rule: only the host can decide to try again.
        if not torch.stack(failures).any():
            return list(uppers)
        if left > 0:
            dampings = [_raised(*given) for given in zip(matrices, dampings, failures, strict=True)]
    raise NotPositiveDefinite(f"second moments of {len(matrices[0])} columns have no Cholesky factor")


def _try_factor(matrix: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Return U, and whether there is none: bool of shape (), on the device."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    # What is there of a factor that failed is inverted too, since to leave that out the host would have to wait; a zero
    # on its diagonal would be an error on the CPU.
    lower.diagonal().masked_fill_(failed != 0, 1.0)
    upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return upper, (failed != 0) | (failed_too != 0)


def _raised(matrix: Tensor, damping: Tensor, failed: Tensor) -> Tensor:
    """Return more damping for a matrix without a factor; others keep theirs, and so their factor."""
    more = torch.maximum(damping * MORE_DAMPING, torch.finfo(matrix.dtype).eps * matrix.diagonal().amax())
    return torch.where(failed, more, damping)


def corrected_weight(weight: Tensor, cross: Tensor, upper: Tensor) -> Tensor:
    """Return W(I + D·H⁻¹), where E|Wx − Vx̂|² is least over all V: there E(Wx − Vx̂)x̂ᵀ = 0.

    Args:
        weight: W [R, K].
        cross: D [K, K], times a.
        upper: U [K, K].
    """
    return weight + (weight @ cross) @ upper.mT @ upper


def round_columns(weight: Tensor, grid: Grid, upper: Tensor, coupling: Tensor | None, block: int = BLOCK) -> Tensor:
    """Round the columns from left to right and return their integers.

    After column j, every later column k changes by −(w_j − v_j)/U_jj · U_jk, and by w_j · P_jk for GPTAQ.

    Args:
        weight: W [R, K].
        grid: of the columns in this order.
        upper: U [K, K].
        coupling: P = a·striu(D·Uᵀ)·U [K, K] (GPTAQ, eq. 17 and its code), or None.
        block: columns per block; the columns after a block are updated once per block, by a matrix product.
    """
    # Columns lie in rows, and every step writes into memory that is there: the loop is a few small operations a column.
    # None of them makes the host wait for a GPU: U_jj stays there too.
    columns = weight.mT.clone(memory_format=torch.contiguous_format)
    delta, zero_point = (t.to(weight.dtype).expand_as(weight).mT.contiguous() for t in (grid.delta, grid.zero_point))
    integers, divisors = torch.empty_like(columns), upper.diagonal()
    for start in range(0, len(columns), block):
        part = slice(start, start + block)
        here, errors, before = columns[part], torch.empty_like(columns[part]), columns[part].clone()
        factor, pull = upper[part, part], None if coupling is None else coupling[part, part]
        steps = zip(here, delta[part], zero_point[part], integers[part], errors, before, divisors[part], strict=True)
        for j, (w, d, z, q, error, kept, divisor) in enumerate(steps):
            torch.div(w, d, out=q).round_().add_(z).clamp_(0, max_level(grid.bits))
            torch.sub(q, z, out=error).mul_(d)
            torch.sub(w, error, out=error).div_(divisor)
            if pull is not None:
                kept.copy_(w)
                here[j + 1 :].addr_(pull[j, j + 1 :], w)
            here[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
        rest = columns[start + block :]
        rest.addmm_(upper[part, start + block :].mT, errors, alpha=-1)
        if coupling is not None:
            rest.addmm_(coupling[part, start + block :].mT, before)
    return integers.mT
