"""Fit the maps that correct a quantized network's ε̂ (PTQD, D²-DPM): D = ε̂ − ε has a predictable part and a spread.

Both give, for each network call, ε' = scale·ε̂ + shift and the standard deviation of what then remains of D.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from qdiff.calibration.noise_pairs import NoisePairs
from qdiff.sampling import NoiseCorrection

# Errors further from their mean than this many standard deviations are left out, as D²-DPM does.
OUTLIER = 4.0
# Largest correlation of D with ε̂, as in D²-DPM: 1 would leave no spread.
LARGEST_CORRELATION = 0.9999


class Kind(str, Enum):
    """What D is regressed on."""

    D2 = "d2"  # on ε̂, which is known while sampling
    PTQD = "ptqd"  # on ε, whose estimate is then solved for


class Per(str, Enum):
    """What shares one set of statistics."""

    TENSOR = "tensor"  # all channels
    CHANNEL = "channel"


class Fit(NamedTuple):
    """The map of one network call, each float64 [C or 1]; see `NoiseCorrection`."""

    scale: Tensor
    shift: Tensor
    error_std: Tensor


def fit_d2(quantized: Tensor, exact: Tensor, per: Per = Per.TENSOR) -> Fit:
    """Subtract the mean of D given ε̂ under their joint normal distribution.

    ε' = ε̂ − μ_D − r·(s_D/s_ε̂)·(ε̂ − μ_ε̂) with the correlation r; s_D·√(1 − r²) remains. Moments are those of the
    elements whose D is no outlier; standard deviations divide by their number.

    Args:
        quantized, exact: ε̂ and ε, [N, C, H, W].

    Source: Zeng et al. 2025, "D²-DPM" (arXiv 2501.08180), its deterministic correction.
    """
    x = _grouped(quantized.double(), per)
    y = _grouped(quantized.double() - exact.double(), per)
    spread = y.std(dim=1, correction=0, keepdim=True)
    kept = ((y - y.mean(dim=1, keepdim=True)).abs() <= OUTLIER * spread).double()

    def mean(values: Tensor) -> Tensor:
        return (kept * values).sum(dim=1) / kept.sum(dim=1)

    mean_x, mean_y = mean(x), mean(y)
    dx, dy = x - mean_x[:, None], y - mean_y[:, None]
    std_x, std_y = mean(dx.square()).sqrt(), mean(dy.square()).sqrt()
    r = _quotient(mean(dx * dy), std_x * std_y).clamp(-LARGEST_CORRELATION, LARGEST_CORRELATION)
    slope = r * _quotient(std_y, std_x)
    return Fit(1.0 - slope, slope * mean_x - mean_y, std_y * (1.0 - r.square()).sqrt())


def fit_ptqd(quantized: Tensor, exact: Tensor, per: Per = Per.TENSOR) -> Fit:
    """Take D as k·ε + μ + noise, and solve for ε: ε' = (ε̂ − μ)/(1 + k).

    k is the slope of D on ε over all elements, 0 if it is negative; μ the mean of D − k·ε in each channel; the standard
    deviation of the noise is the mean over samples of that of D − k·ε, over all channels or in each.

    Args:
        quantized, exact: ε̂ and ε, [N, C, H, W].

    Source: He et al. 2023, "PTQD" (arXiv 2305.10657), section 3.3. Its code has one standard deviation for all
        channels, the paper one for each; its code also takes μ from D.
    """
    e, d = exact.double(), quantized.double() - exact.double()
    centred = e - e.mean()
    k = _quotient((centred * d).sum(), centred.square().sum()).clamp(min=0.0)
    rest = d - k * e
    shift = -rest.mean(dim=(0, 2, 3)) / (1.0 + k)
    dims = (2, 3) if per is Per.CHANNEL else (1, 2, 3)
    std = rest.std(dim=dims, correction=0).mean(dim=0) / (1.0 + k)
    return Fit((1.0 / (1.0 + k)).expand_as(shift), shift, std.expand_as(shift))


FITS: dict[Kind, Callable[[Tensor, Tensor, Per], Fit]] = {Kind.D2: fit_d2, Kind.PTQD: fit_ptqd}


def fit_correction(kind: Kind, per: Per, pairs: NoisePairs) -> NoiseCorrection:
    """Return the correction that a sampling run with the same calls uses."""
    fits = [FITS[kind](quantized, exact, per) for quantized, exact in zip(pairs.quantized, pairs.exact, strict=True)]
    return NoiseCorrection(pairs.times, *(torch.stack(tables) for tables in zip(*fits, strict=True)))


def correction_error(correction: NoiseCorrection | None, pairs: NoisePairs) -> float:
    """Return the mean squared difference of ε' (without a correction: ε̂) from ε over all calls."""
    total, elements = 0.0, 0
    for call, (quantized, exact) in enumerate(zip(pairs.quantized, pairs.exact, strict=True)):
        found = quantized.double()
        if correction is not None:
            found = correction.scale[call].view(-1, 1, 1) * found + correction.shift[call].view(-1, 1, 1)
        total += float((found - exact.double()).square().sum())
        elements += exact.numel()
    return total / elements


def _grouped(values: Tensor, per: Per) -> Tensor:
    """Return [N, C, H, W] as [groups, elements]: one group for all channels, or one for each."""
    return values.reshape(1, -1) if per is Per.TENSOR else values.transpose(0, 1).reshape(values.shape[1], -1)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a/b, and 0 where b is 0: what does not vary predicts nothing."""
    return torch.where(b > 0, a / b.clamp(min=torch.finfo(b.dtype).tiny), torch.zeros_like(b))
