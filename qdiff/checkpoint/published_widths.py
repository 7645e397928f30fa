"""Find out which activation widths a published checkpoint was made with: it stores step sizes, not widths.

A step size and what passes through a quantizer tell how many levels were meant. Right files, ours and the papers', span
between 0.1 bits less (min-max of larger sets) and 0.9 bits more (ranges shrunk for 2 bits) than their width; another
width shifts that by the difference. Whether the given width then does harm, or is one that the file never uses, the
error of ε says.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.functional import max_level
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer

WIDEST = 16  # bits: with as many, no step size of a file clips anything
# Bits by which the median span must go beyond the width, or stay below it, before the error of ε is looked at.
BEYOND, BELOW = 0.6, 1.25
# The error of the given width over that without clipping: at most 4 for right files, 30 and more one bit too narrow.
HARMFUL = 10.0
# The error of a narrower width over that without clipping: at most 4 for the file's own, 10 and more for others.
HARMLESS = 5.0
# Softmax outputs are at most 1; learning moves a range a little, and another width by a factor of 2 a bit.
LARGEST_SOFTMAX = 1.9


def check_softmax_ranges(softmax: Mapping[str, tuple[float, int, int]], path: Path) -> None:
    """Raise a `UserError` where softmax quantizers would reach far beyond 1, the largest output of a softmax.

    Args:
        softmax: by published name, the step size, the zero point, and the width asked for.
    """
    reach = {name: delta * (max_level(bits) - zero_point) for name, (delta, zero_point, bits) in softmax.items()}
    name = max(reach, key=reach.__getitem__, default=None)
    if name is not None and reach[name] > LARGEST_SOFTMAX:
        bits = softmax[name][2]
        most = max(2, bits - math.floor(math.log2(reach[name])))
        raise UserError(
            f"checkpoint {path} was made with another width: {name} has steps of at most {most} bits for outputs "
            f"from 0 to 1, not {bits}; change --sm_abit"
        )


@torch.no_grad()
def check_widths(qnn: QuantModel, inputs: Sequence[Tensor], path: Path) -> None:
    """Raise a `UserError` where the activation widths of a network are not those of the file that filled it.

    It takes one call of the network, and where that one is suspicious up to three more. Weights stay in float
    meanwhile, so that only activations count. Too narrow a width is found for softmax outputs as for all others; too
    wide a one only for others: what a softmax gives for a few inputs may well stay below what it can give.

    Args:
        qnn: filled, its float weights at hand.
        inputs: what its network is called with: (x [N, C, H, W], t [N][, context [N, L, D]]), N about 2.
        path: named in errors.
    """
    quantizers = qnn.calibrated_act_quantizers()
    kinds = (
        ("--act_bit", "activations", [q for q in quantizers.values() if not q.unsigned]),
        ("--sm_abit", "softmax outputs", [q for q in quantizers.values() if q.unsigned]),
    )
    kinds = tuple(kind for kind in kinds if kind[2])
    if not kinds:
        return
    inputs = tuple(part.to(qnn.device) for part in inputs)
    wanted, spans = _observed(qnn, inputs)
    unclipped: float | None = None
    for option, what, members in kinds:
        given = members[0].bits
        span = float(torch.stack([spans[q] for q in members]).log2().median())
        narrow, wide = span > given + BEYOND and given < WIDEST, not members[0].unsigned and span < given - BELOW
        if not (narrow or wide):
            continue
        if unclipped is None:
            unclipped = _error(qnn, inputs, wanted, kinds, {})
        likely = min(WIDEST, max(2, round(span)))
        tried = given if narrow else likely
        error = _error(qnn, inputs, wanted, kinds, {option: tried})
        clips = error > unclipped * (HARMFUL if narrow else HARMLESS)
        if clips is narrow:
            found = f"{error:.1e} with {given} bits and {unclipped:.1e} with more" if narrow else "the same with fewer"
            raise UserError(
                f"checkpoint {path} was made with about {likely} bits for {what}, not {given} (the error of ε is "
                f"{found}); change {option}"
            )


class _Extremes:
    """Keeps the extremes of what passes a quantizer, and the number of levels from the one to the other."""

    def __init__(self, quantizer: ActQuantizer) -> None:
        self.quantizer, self.low, self.high = quantizer, None, None

    def update(self, x: Tensor) -> None:
        low, high = x.amin().float(), x.amax().float()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    @property
    def span(self) -> Tensor:
        if self.low is None:
            return torch.full((), float(2**self.quantizer.bits), device=self.quantizer.delta.device)
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        if _is_centred(self.quantizer):
            low = -torch.maximum(-low, high)
            high = -low
        return (high - low) / self.quantizer.delta.float() + 1


def _observed(qnn: QuantModel, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[ActQuantizer, Tensor]]:
    """Return the float ε, and of every calibrated quantizer how many of its steps its input spans."""
    watched = {q: _Extremes(q) for q in qnn.calibrated_act_quantizers().values()}
    try:
        for quantizer, extremes in watched.items():
            quantizer.observer = extremes
        with qnn.quantized(weights=False):
            wanted = qnn(*inputs).double()
    finally:
        for quantizer in watched:
            quantizer.observer = None
        qnn.reset_fired()
    return wanted, {q: extremes.span for q, extremes in watched.items()}


def _error(
    qnn: QuantModel, inputs: tuple[Tensor, ...], wanted: Tensor, kinds: Sequence[tuple], widths: Mapping[str, int]
) -> float:
    """Return the mean squared error of ε over ε's mean square, kinds that are not in ``widths`` being `WIDEST`."""
    with contextlib.ExitStack() as stack:
        for option, _, members in kinds:
            stack.enter_context(_width(members, widths.get(option, WIDEST)))
        with qnn.quantized(weights=False):
            found = qnn(*inputs).double()
    qnn.reset_fired()
    square = wanted.square().mean().clamp(min=1e-30)
    # Far below it, differences are of summation order.
    return max(1e-10, float((found - wanted).square().mean() / square))


@contextlib.contextmanager
def _width(quantizers: Sequence[ActQuantizer], bits: int) -> Iterator[None]:
    """Give quantizers another width inside the block; zero points in the middle of the levels move with it."""
    before = [(q, q.bits, q.zero_point.clone()) for q in quantizers]
    try:
        for quantizer in quantizers:
            if _is_centred(quantizer):
                quantizer.zero_point.fill_(2 ** (bits - 1))
            quantizer.bits = bits
        yield
    finally:
        for quantizer, own, zero_point in before:
            quantizer.bits = own
            quantizer.zero_point.copy_(zero_point)


def _is_centred(quantizer: ActQuantizer) -> bool:
    """Whether the zero point is that of a signed range, which the width alone decides."""
    return (quantizer.symmetric or quantizer.unsigned) and int(quantizer.zero_point) == 2 ** (quantizer.bits - 1)
