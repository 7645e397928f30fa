"""SSIM by its definition, in float64, that tests compare the project's with."""

from __future__ import annotations

import numpy as np
from scipy.signal import convolve2d

SSIM_TOLERANCE = 1e-9  # both are float64; each default below, changed a little, gives a value 1,000 times as far away


def ssim(
    a: np.ndarray, b: np.ndarray, sigma: float = 1.5, c: tuple[float, float] = (0.01, 0.03), mode: str = "valid"
) -> float:
    """Return the mean of Wang et al. 2004, equations 13 to 17, one map for every image and channel of [N, H, W, C]."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * sigma**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = ((k * 255) ** 2 for k in c)
    values = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        for channel in range(x.shape[-1]):
            u, v = x[..., channel], y[..., channel]
            mu, nu, uu, vv, uv = (convolve2d(m, window, mode, "symm") for m in (u, v, u * u, v * v, u * v))
            top = (2 * mu * nu + c1) * (2 * (uv - mu * nu) + c2)
            values.append(np.mean(top / ((mu**2 + nu**2 + c1) * (uu - mu**2 + vv - nu**2 + c2))))
    return float(np.mean(values))
