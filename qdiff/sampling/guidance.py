"""Classifier-free guidance: a conditional network as ε(x, t)."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.sampling.interface import Network, NoisePrediction


def guided(network: Network, condition: Tensor | None, unconditional: Tensor | None, scale: float) -> NoisePrediction:
    """Return ε_u + scale·(ε_c − ε_u) as a function of (x, t), with one network call for both halves.

    Args:
        network: ε(x, t[, context]).
        condition: [N, L, D], or None for an unconditional network.
        unconditional: likewise; None evaluates only the condition.

    Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", in the form of the latent diffusion samplers.
    """
    if condition is None:
        return network
    if unconditional is None:
        return lambda x, t: network(x, t, condition)
    context = torch.cat([unconditional, condition])

    def eps(x: Tensor, t: Tensor) -> Tensor:
        without, with_ = network(torch.cat([x, x]), torch.cat([t, t]), context).chunk(2)
        return without + scale * (with_ - without)

    return eps
