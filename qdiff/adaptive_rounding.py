"""AdaRound: learn whether each weight rounds up or down (Nagel et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.functional import max_level
from qdiff.quant_layer import QuantModule

# The stretched sigmoid h(α) = clamp((ζ − γ)·σ(α) + γ, 0, 1).
ZETA, GAMMA = 1.1, -0.1


class LearnedRounding:
    """The rounding variable α of one layer while it is learned.

    Softly rounded weights are δ·(clamp(⌊w/δ⌋ + h(α) + z, 0, 2^b − 1) − z), and h starts at the fractional part of
    w/δ, so that they start as the float weights. All slices of a split layer take part, in the loss and in the
    regulariser. Nothing outlives `harden` but the layer's integers.
    """

    def __init__(self, layer: QuantModule) -> None:
        self.layer = layer
        weight = layer.float_weight().detach().float()
        quantizers = list(layer.weight_quantizers)
        self.top = max_level(quantizers[0].bits)
        self.delta = self._per_weight([q.delta.detach() for q in quantizers])
        self.zero_point = self._per_weight([q.zero_point for q in quantizers])
        scaled = weight / self.delta
        self.floor = scaled.floor()
        fraction = scaled - self.floor
        # Inverse of the stretched sigmoid; 0 ≤ fraction < 1 stays inside its open interval.
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1))

    def _per_weight(self, parts: list[Tensor]) -> Tensor:
        """Broadcast per-slice [C, 1, …] tensors against the whole weight."""
        if len(parts) == 1:
            return parts[0]
        shape = list(self.layer.weight.shape)
        return torch.cat(
            [p.expand(shape[0], width, *shape[2:]) for p, width in zip(parts, self.layer.slices, strict=True)],
            dim=1,
        )

    def h(self) -> Tensor:
        """h(α) in [0, 1], weight's shape."""
        return ((ZETA - GAMMA) * torch.sigmoid(self.alpha) + GAMMA).clamp(0, 1)

    def soft_weight(self) -> Tensor:
        q = (self.floor + self.h() + self.zero_point).clamp(0, self.top)
        return (q - self.zero_point) * self.delta

    def regulariser(self, beta: float) -> Tensor:
        """Σ 1 − |2h(α) − 1|^β: 0 when every h is 0 or 1."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()

    def __enter__(self) -> LearnedRounding:
        self.layer.begin_soft_rounding(self.soft_weight)
        return self

    def __exit__(self, *_: object) -> None:
        self.layer.end_soft_rounding()

    @torch.no_grad()
    def harden(self) -> None:
        """Decide every rounding (up where α ≥ 0) and give the integers to the layer."""
        self.layer.set_weight_int((self.floor + (self.alpha >= 0) + self.zero_point).clamp(0, self.top))
