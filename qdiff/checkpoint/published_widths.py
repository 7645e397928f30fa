"""Infer the activation widths of a published checkpoint, which stores step sizes but not widths.

The step size and the values that pass through a quantizer show how many levels were intended. In correct files, native
and published, the values span from 0.1 bits less (min-max of larger sets) to 0.9 bits more (ranges shrunk for 2 bits)
than the width; a wrong width shifts that by the difference. The error of ε then decides whether the given width is too
narrow, or wider than the file ever uses.
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

WIDEST = 16  # bits; at this width no step size of a file clips anything
# Bits by which the median span must exceed the width, or stay below it, before the error of ε is computed.
BEYOND, BELOW = 0.6, 1.25
# Error at the given width relative to the error without clipping: at most 4 for the correct width, at least 30 for one
# bit too few.
HARMFUL = 10.0
# Error at a narrower width relative to the error without clipping: at most 4 for the file's own width, at least 10 for
# others.
HARMLESS = 5.0
# Softmax outputs are at most 1; learning moves a range slightly, a wrong width by a factor of 2 per bit.
LARGEST_SOFTMAX = 1.9


def check_softmax_ranges(softmax: Mapping[str, tuple[float, int, int]], path: Path) -> None:
    """Raise a `UserError` if softmax quantizers reach far beyond 1, the largest softmax output.

    Args:
        softmax: published name → step size, zero point and requested width.
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
    """Raise a `UserError` if the activation widths of a network are not those of the file that it was loaded from.

    This takes one network call, and up to three more if the first is suspicious. Weights stay in float during these
    calls, so only activations count. A width that is too narrow is detected for all quantizers; one that is too wide is
    not detected for softmax outputs, which may stay far below 1 for a few inputs.

    Args:
        qnn: loaded, with its float weights.
        inputs: inputs of its network: (x [N, C, H, W], t [N][, context [N, L, D]]), N about 2.
        path: the file's name for error messages.
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
    """Tracks the extremes of a quantizer's input, and the number of levels between them."""

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
    """Return the float ε and, per calibrated quantizer, how many of its steps its input spans."""
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
    """Return the mean squared error of ε over ε's mean square; kinds that are not in ``widths`` get `WIDEST`."""
    with contextlib.ExitStack() as stack:
        for option, _, members in kinds:
            stack.enter_context(_width(members, widths.get(option, WIDEST)))
        with qnn.quantized(weights=False):
            found = qnn(*inputs).double()
    qnn.reset_fired()
    square = wanted.square().mean().clamp(min=1e-30)
    # Smaller differences come from summation order only.
    return max(1e-10, float((found - wanted).square().mean() / square))


@contextlib.contextmanager
def _width(quantizers: Sequence[ActQuantizer], bits: int) -> Iterator[None]:
    """Give quantizers another width inside the block; zero points in the middle of the levels move accordingly."""
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
    """Whether the zero point is that of a signed range, which depends only on the width."""
    return (quantizer.symmetric or quantizer.unsigned) and int(quantizer.zero_point) == 2 ** (quantizer.bits - 1)
