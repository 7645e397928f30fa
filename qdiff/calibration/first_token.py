"""Find the layers that read a context whose first token is always the same, and make its outputs constants (MixDQ)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.functional import at_least_single
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.ranges.first_token import FirstToken, is_same_token
from qdiff.tracing.context import Context, context_of
from qdiff.tracing.trace import Call, call_directly

LEAVE_OUT = "leave out --bos_aware"
NO_READER = f"no layer that is quantized reads a context of tokens; {LEAVE_OUT}"


@dataclass(frozen=True)
class _Read:
    """What a layer took in one call: the context, if it was one; its number of tokens, and the output of the first."""

    context: Context | None
    tokens: int = 0
    output: Tensor | None = None


@torch.no_grad()
def find_first_tokens(
    network: nn.Module, inputs: Sequence[Tensor], call: Call = call_directly
) -> dict[str, FirstToken]:
    """Return what the linear layers that read the context make of its first token, by name.

    A layer reads the context if it takes one of the network's inputs, or a view of it, as tokens [N, L, C] in all its
    calls. Of the layers that read one context, the first in execution order has the token itself. Layers without
    quantizers in a `QuantModel` are left out.

    Args:
        network: computes in float; its layers may be wrapped.
        inputs: (x, t, conditions…) of all samples, batch first, on any device.
        call: see `QuantModel`.

    Raises:
        UserError: no layer reads a context, it has one token, or its first token is not the same for all samples.
    """
    device = next(p.device for p in network.parameters() if not p.is_meta)
    one = tuple(i[:1].to(device).clone() for i in inputs)
    calls: dict[str, list[_Read]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(leaf_modes([network], weights=False, activations=False))
        for name, layer in network.named_modules():
            if isinstance(layer, nn.Linear) or _quantizes_tokens(layer):

                def note(_: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                    context = context_of(args[0], one)
                    read = _Read(None) if context is None else _Read(context, args[0].shape[1], out[0, 0])
                    calls.setdefault(name, []).append(read)

                stack.callback(layer.register_forward_hook(note).remove)
        call(network, *one)
    found = {name: reads[0] for name, reads in calls.items() if len({read.context for read in reads}) == 1}
    found = {name: read for name, read in found.items() if read.context is not None}
    if not found:
        raise UserError(NO_READER)
    if not (found := {name: read for name, read in found.items() if read.tokens > 1}):
        raise UserError(f"the context is a single token, and none would be left to quantize; {LEAVE_OUT}")
    tokens = {c: _the_one(c.first_tokens(inputs)) for c in {read.context: None for read in found.values()}}
    made = {}
    for name, read in found.items():
        token = tokens.pop(read.context, None)  # the first layer that reads it has it
        made[name] = FirstToken(at_least_single(read.output), None if token is None else token.to(device))
    return made


def _quantizes_tokens(layer: nn.Module) -> bool:
    if not isinstance(layer, QuantModule) or layer.geometry is not None:
        return False
    return len(layer.weight_quantizers) > 0 or len(layer.act_quantizers) > 0


def _the_one(first: Tensor) -> Tensor:
    """Return the first token [C] of all samples [N, C].

    Raises:
        UserError: they differ.
    """
    same = is_same_token(first, first[0])
    if not same.all():
        other = int((~same).int().argmax())
        raise UserError(
            f"the first token of the context is not the same for all samples (number {other} differs from number 0): "
            f"the text encoder looks in both directions, or texts begin with tokens of their own; {LEAVE_OUT}"
        )
    return first[0]


def set_first_tokens(qnn: QuantModel, inputs: Sequence[Tensor]) -> None:
    """Make the outputs of the context's first token constants, in a network whose config asks for it (``bos_aware``).

    Args:
        qnn: its float weights are loaded.
        inputs: (x, t, conditions…) of all samples, batch first.

    Raises:
        UserError: see `find_first_tokens`.
    """
    if qnn.config.bos_aware:
        found = find_first_tokens(qnn.model, inputs, lambda _, *some: qnn(*some))
        for name, layer in qnn.layers().items():
            layer.first_token = found.get(name)
