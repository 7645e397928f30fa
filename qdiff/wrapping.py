"""Replace layers of a float network by quantized ones, and report the layers that stay in float."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from qdiff.config import QuantConfig
from qdiff.errors import first_few
from qdiff.interface import AttentionCore
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QUANTIZABLE, QuantModule

log = logging.getLogger("qdiff")

_OF_PRODUCTS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_backward_pre_hooks",
)


def replace_leaves(
    network: nn.Module, config: QuantConfig, ends: tuple[str, str] | None, unused: Collection[str] = ()
) -> dict[str, str]:
    """Replace convolutions, linear layers and attention cores in place; parameters and hooks are kept.

    A layer is replaced only if its class computes what `QuantModule` computes. A module that is used in several
    places is replaced by one module in all of them. Of a parameter shared by several layers, all layers but the first
    get a copy, because each layer has its own integers.

    Args:
        ends: see `QuantConfig.of_layer`.
        unused: names of layers that no forward calls; they stay in float.

    Returns:
        The reason why a layer with products stays in float, by layer name.
    """
    left: dict[str, str] = {}
    replaced: dict[nn.Module, nn.Module] = {}
    weights: set[int] = set()
    for parent, path, name, child in list(_children(network)):
        if child not in replaced:
            reason = "it is never called" if path in unused else why_not(child)
            if reason is not None:
                left[path] = reason
                continue
            if isinstance(child, AttentionCore):
                made: nn.Module = QuantAttention(child, config)
            else:
                if id(child.weight) in weights:
                    child.weight = nn.Parameter(child.weight.detach().clone())
                weights.add(id(child.weight))
                made = QuantModule(child, config.of_layer(path, ends))
            for hooks in _HOOKS:  # keep the same dicts, so that existing handles can still remove their hooks
                setattr(made, hooks, getattr(child, hooks))
            replaced[child] = made
        setattr(parent, name, replaced[child])
    if left:
        log.warning("%d layers stay in float: %s", len(left), first_few(left))
    return left


def _children(network: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
    """Yield (parent, path, name, child) for every layer with products; shared layers come once per place.

    Layers inside a module with a computation of its own, such as the projection of ``nn.MultiheadAttention``, are
    skipped.
    """
    seen: set[nn.Module] = set()

    def walk(parent: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str, nn.Module]]:
        if parent in seen:
            return
        seen.add(parent)
        for name, child in parent._modules.items():
            if child is None:
                continue
            path = f"{prefix}{name}"
            if isinstance(child, (*_OF_PRODUCTS, AttentionCore)):
                yield parent, path, name, child
            else:
                yield from walk(child, f"{path}.")

    yield from walk(network, "")


def why_not(layer: nn.Module) -> str | None:
    """Return why a layer with products stays in float; None if it is replaced."""
    kind = type(layer).__name__
    if isinstance(layer, AttentionCore):
        own = type(layer).forward is not AttentionCore.forward
        return f"{kind} has a forward of its own" if own else None
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized"
    base = next((b for b in QUANTIZABLE if isinstance(layer, b)), None)
    if base is None or isinstance(layer, NonDynamicallyQuantizableLinear):
        return f"{kind} cannot be quantized"
    inherited = all(getattr(type(layer), m, None) is getattr(base, m, None) for m in ("forward", "_conv_forward"))
    if not inherited or "forward" in vars(layer):
        return f"{kind} has a forward of its own"
    if set(layer._parameters) - {"weight", "bias"} or layer._parameters.get("weight") is None:
        return f"{kind} computes its weight"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"its padding is {layer.padding_mode}"
    return None
