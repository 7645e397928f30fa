"""TDAC: how many calibration samples each step gives, derived from how the network's features change over the steps.

Source: Liu et al. 2024 (EDA-DM, arXiv 2401.04585), "Temporal Distribution Alignment Calibration".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.calibration.timesteps import uniform_counts
from qdiff.errors import UserError

CHUNK_ELEMENTS = 1 << 22
"""How many feature values, over all steps, are held in float64 at a time (32 MiB)."""

# A zero vector has no direction: its cosine with anything is 0 (the floor of torch's cosine_similarity).
_NORM_FLOOR = 1e-8
# A spread of V below this share of its largest possible value is rounding error of the sums; stretching it to [0, 1]
# would turn noise into weights.
_ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Allocation:
    """How many samples each step gives, and why. Steps are in sampling order, noisiest first.

    Attributes:
        density: D, float64 [T]: how many other steps have features within the radius.
        variety: V, float64 [T]: Σ (1 − cos) to all other steps, over images and positions.
        weight: w = D' + λ·V', float64 [T], with D' and V' normalised to [0, 1].
        counts: n, int64 [T]; they sum to the requested number of samples.
    """

    density: Tensor
    variety: Tensor
    weight: Tensor
    counts: Tensor


def tdac(features: Tensor | Sequence[Tensor], radius: float, lamda: float, count: int) -> Allocation:
    """Distribute ``count`` samples over the steps of a sampling run.

    Args:
        features: [T, N, C, …] or T tensors [N, C, …] in sampling order: the input of the middle attention block at
            every step, in any floating dtype (`qdiff.calibration.recording.record_features`).
        radius: r, the mean squared difference up to which two steps are near, in units of the features squared.
        lamda: λ, weight of variety relative to density.
        count: N, the total number of samples.

    Raises:
        UserError: an argument is out of range, or the features are not finite.
    """
    if count < 1:
        raise UserError(f"the number of calibration samples is {count}; give at least 1")
    if not 0 <= lamda < math.inf:
        raise UserError(f"--lamda is {lamda}; give 0 or more")
    if not radius > 0:
        raise UserError(f"--tdac_radius is {radius}; give it above 0")
    squared, cosines, positions = _pairwise(features)
    steps = len(squared)
    others = ~torch.eye(steps, dtype=torch.bool)
    density = ((squared <= radius) & others).sum(1).double()
    variety = ((positions - cosines) * others).sum(1)
    if variety.max() - variety.min() <= _ROUNDING * 2 * positions * steps:
        variety = variety.mean().expand(steps).clone()
    weight = normalised(density) + lamda * normalised(variety)
    return Allocation(density, variety, weight, counts_from_weights(weight, count))


def normalised(values: Tensor) -> Tensor:
    """Return (x − min)/(max − min), [T]; zeros if all are equal (0/0 in the published code)."""
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else torch.zeros_like(values)


def counts_from_weights(weight: Tensor, count: int) -> Tensor:
    """Return n_i = round(N·w_i/Σw), int64 [T], repaired so that they sum to N; uniform if all weights are 0."""
    if not weight.sum() > 0:
        return uniform_counts(len(weight), count)
    counts = (count * weight.double() / weight.double().sum()).round().long()
    return repaired(counts, weight, count)


def repaired(counts: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return rounded counts, adjusted so that they sum to ``count``.

    If too few, the steps with the largest weights (counts are ordered as weights are) get one more each, ties in
    sampling order. If too many, steps lose one each from the last backwards, none below 0. This repeats as often as
    necessary.

    Args:
        counts: int64 [T], not negative.
        weight: [T], the weights that the counts were rounded from.
        count: at least 0.
    """
    counts = counts.clone()
    largest_first = weight.argsort(descending=True, stable=True)
    while (missing := count - int(counts.sum())) != 0:
        if missing > 0:
            counts[largest_first[:missing]] += 1
        else:
            last_first = counts.nonzero().flatten().flip(0)
            counts[last_first[:-missing]] -= 1
    return counts


@torch.no_grad()
def _pairwise(features: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Return mean squared differences [T, T], sums of cosines [T, T], and the number of positions in each sum.

    Both follow from scalar products: ‖a − b‖² = ‖a‖² + ‖b‖² − 2a·b, and once every channel vector has length 1 the
        scalar product of two steps IS the sum of their cosines. Two Gram matrices therefore suffice, and they are
        summed over chunks of images, without T² passes over the features or a copy of them all. float64 keeps errors in
        the differences of large sums far below the features' own rounding.
    """
    steps, shape = len(features), features[0].shape if len(features) else ()
    if len(shape) < 2 or any(f.shape != shape for f in features) or math.prod(shape) == 0:
        raise ValueError("features must be T tensors of one shape [N, C, …] and not empty")
    device = features[0].device
    gram, cosines = torch.zeros(2, steps, steps, dtype=torch.float64, device=device)
    elements = math.prod(shape)
    at_once = max(1, CHUNK_ELEMENTS * shape[0] // (steps * elements))
    for first in range(0, shape[0], at_once):
        part = torch.stack([f[first : first + at_once] for f in features]).double()
        for total in (gram, cosines):
            flat = part.flatten(1)
            total.addmm_(flat, flat.T)
            part /= part.norm(dim=2, keepdim=True).clamp_min(_NORM_FLOOR)
    if not gram.isfinite().all():
        raise UserError("the network's features are not finite; check the weights, or sample in full precision")
    own = gram.diagonal()
    squared = (own[:, None] + own[None] - gram - gram.T) / elements
    cosines = (cosines + cosines.T) / 2  # matrix products may be asymmetric in the last bit
    return squared.clamp_min(0).cpu(), cosines.cpu(), elements // shape[1]
