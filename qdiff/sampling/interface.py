"""What every sampler takes from its caller, as types: the network, the noise source and the callback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

NoisePrediction = Callable[[Tensor, Tensor], Tensor]
"""``eps(x, t)``: the noise prediction ε_θ. x [N, C, H, W], t [N], result shaped like x. Conditions and
classifier-free guidance are closed over by the caller; no sampler knows of them."""

OnStep = Callable[[int, float, Tensor, Tensor], None]
"""``on_step(i, t, x, x0_pred)`` after step i (from 0): ``t`` is the time that the step left, as the network
saw it, ``x`` [N, C, H, W] the state that it reached, and ``x0_pred`` the clean image predicted at ``t``. No
sampler changes these tensors afterwards, so they may be kept without a copy."""


class NoiseSource(Protocol):
    """Anything with a ``draw()``: `qdiff.sampling.ImageNoise` in programs, a few lines in a test."""

    def draw(self) -> Tensor:
        """Return fresh standard normal noise [N, C, H, W]."""
        ...
