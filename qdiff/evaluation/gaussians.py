"""Mean and covariance of features, and the Fréchet distance between two of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of ``count`` vectors.

    Attributes:
        mu: float64 [D].
        sigma: float64 [D, D], with the divisor count−1.
        count: number of vectors; 0 if a file does not say.
    """

    mu: np.ndarray
    sigma: np.ndarray
    count: int = 0

    def __post_init__(self) -> None:
        size = self.mu.shape[0] if self.mu.ndim == 1 else -1
        if self.sigma.shape != (size, size):
            raise ValueError(f"mean and covariance must be [D] and [D, D], not {self.mu.shape} and {self.sigma.shape}")
        if not (np.isfinite(self.mu).all() and np.isfinite(self.sigma).all()):
            raise ValueError("mean or covariance holds values that are not finite")

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Return the Gaussian of features [N, D], N ≥ 2, summed in float64."""
        running = RunningGaussian()
        running.add(features)
        return running.result()


class RunningGaussian:
    """Mean and covariance of vectors that come in batches; the memory is D² numbers for any number of vectors.

    Batches are merged by the pairwise update of Chan, Golub and LeVeque (1979), which does not lose digits if the mean
    is large compared with the spread.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, features: np.ndarray) -> None:
        """Add features [n, D] of any float dtype."""
        batch = features.astype(np.float64)
        count, mean = len(batch), batch.mean(axis=0)
        centred = batch - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        total, step = self.count + count, mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(step, step) * (self.count * count / total)
        self._mean = self._mean + step * (count / total)
        self.count = total

    def result(self) -> Gaussian:
        """Return the Gaussian of all vectors added, two or more."""
        return Gaussian(self._mean, self._scatter / (self.count - 1), self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return |μ₁−μ₂|² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), computed by torch-fidelity (Heusel et al. 2017, eq. 6).

    The trace of the root is a sum over eigenvalues, so covariances without full rank need no offset: fewer images than
    features give a valid, though biased, result.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    parts = ({"mu": g.mu, "sigma": g.sigma} for g in (a, b))
    return fid_statistics_to_metric(*parts, verbose=False)[KEY_METRIC_FID]
