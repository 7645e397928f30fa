"""AdaRound: learn whether each weight rounds up or down (Nagel et al., 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.functional import max_level
from qdiff.quant_layer import QuantModule

# The stretched sigmoid h(α) = clamp((ζ − γ)·σ(α) + γ, 0, 1).
ZETA, GAMMA = 1.1, -0.1
# Least distance of h from ½ where roundings start from integers: the loss may turn a rounding, batch noise may not.
MARGIN = 0.2


class LearnedRounding:
    """The rounding variable α of one layer while it is learned.

    Softly rounded weights are δ·(clamp(base + h(α) + z, 0, 2^b − 1) − z), and hardening leaves base or base + 1. All
    slices of a split layer take part in the loss and in the regulariser. After `harden`, only the layer's integers
    remain.

    Args:
        layer: the layer; its grids are set.
        from_integers: False starts as published: base is ⌊w/δ⌋ and h the fractional part of w/δ, so that softly
            rounded weights initially equal the float weights. True starts at the layer's present integers, which
            hardening α at once would give back (`around_integers`).
    """

    def __init__(self, layer: QuantModule, from_integers: bool = False) -> None:
        self.layer = layer
        weight = layer.weight_to_quantize().detach().float()
        self.top = max_level(layer.weight_quantizers[0].bits)
        self.delta, self.zero_point = layer.weight_grid()
        scaled = weight / self.delta
        if from_integers:
            self.base, h = around_integers(scaled, layer.weight_int, self.zero_point, self.top)
        else:
            self.base = scaled.floor()
            h = scaled - self.base  # 0 ≤ h < 1 stays inside the open interval of the stretched sigmoid
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (h - GAMMA) - 1))

    def h(self) -> Tensor:
        """Return h(α) in [0, 1], in the weight's shape."""
        return ((ZETA - GAMMA) * torch.sigmoid(self.alpha) + GAMMA).clamp(0, 1)

    def soft_weight(self) -> Tensor:
        q = (self.base + self.h() + self.zero_point).clamp(0, self.top)
        return (q - self.zero_point) * self.delta

    def regulariser(self, beta: float) -> Tensor:
        """Return Σ 1 − |2h(α) − 1|^β, which is 0 if every h is 0 or 1."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()

    def __enter__(self) -> LearnedRounding:
        self.layer.begin_soft_rounding(self.soft_weight)
        return self

    def __exit__(self, *_: object) -> None:
        self.layer.end_soft_rounding()

    @torch.no_grad()
    def harden(self) -> None:
        """Round every weight (up where α ≥ 0) and set the layer's integers."""
        self.layer.set_weight_int((self.base + (self.alpha >= 0) + self.zero_point).clamp(0, self.top))


def around_integers(scaled: Tensor, integers: Tensor, zero_point: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the base and the first h of roundings that start at given integers q.

    The two candidates are r = q − z and its neighbour towards w/δ, within the levels. h is the position of w/δ between
    them where that lies there, rounds to r, and is at least `MARGIN` from ½; otherwise h is `MARGIN` from ½ on the side
    of r.

    Args:
        scaled: w/δ.
        integers: q, in the weight's shape.
        zero_point: z, broadcast against it.
        top: 2^b − 1.

    Returns:
        base and h, both in the weight's shape; base + [h ≥ ½] = r.
    """
    rounded = integers.to(scaled.dtype) - zero_point
    base = torch.where(rounded <= scaled, rounded, rounded - 1)
    base = torch.maximum(torch.minimum(base, top - 1.0 - zero_point), -zero_point.to(scaled.dtype))
    up = rounded > base
    h = scaled - base
    kept = (h >= 0) & (h <= 1) & ((h >= 0.5) == up) & ((h - 0.5).abs() >= MARGIN)
    return base, torch.where(kept, h, torch.where(up, 0.5 + MARGIN, 0.5 - MARGIN))
