"""Types of the arguments that every sampler shares: the network, the noise source and the callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Network = Callable[..., Tensor]
"""``network(x, t[, context])``, float or quantized: returns its training target for x [N, C, H, W] at t [N]."""

NoisePrediction = Callable[[Tensor, Tensor], Tensor]
"""``eps(x, t)``: the noise prediction ε_θ. x [N, C, H, W], t [N], result shaped like x. The caller binds
conditions and classifier-free guidance; samplers do not know about them."""

OnStep = Callable[[int, float, Tensor, Tensor], None]
"""``on_step(i, t, x, x0_pred)`` after step i (from 0): ``t`` is the time at the start of the step, as passed
to the network, ``x`` [N, C, H, W] the state after it, and ``x0_pred`` the clean image predicted at ``t``.
Samplers do not modify these tensors afterwards, so they can be kept without a copy."""


class NoiseSource(Protocol):
    """Anything with a ``draw()``, such as `qdiff.sampling.ImageNoise`."""

    def draw(self) -> Tensor:
        """Return fresh standard normal noise [N, C, H, W]."""
        ...


class OnCall(Protocol):
    """Called with the inputs of every network call of a sampling run, before guidance doubles the batch."""

    def __call__(
        self, x: Tensor, t: Tensor, condition: Tensor | None = None, unconditional: Tensor | None = None
    ) -> None:
        """x [N, C, H, W], t [N]; condition and unconditional context [N, L, D], or None if not used."""


class Correction(Protocol):
    """What a sampling run makes of the noise prediction, such as a `qdiff.sampling.NoiseCorrection`.

    Attributes:
        error_std: see `qdiff.sampling.registry.SamplingRun`.
    """

    error_std: Tensor | None

    def applied_to(self, eps: NoisePrediction) -> NoisePrediction:
        """Return the noise prediction that one run of the sampler uses instead of ``eps``."""
        ...
