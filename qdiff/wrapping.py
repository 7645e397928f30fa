"""Replace layers of a float network by quantized ones, and report the layers that stay in float."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from qdiff.config import FIRST, LAST, QuantConfig
from qdiff.errors import UserError, first_few
from qdiff.interface import AttentionCore
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QUANTIZABLE, QuantModule

log = logging.getLogger("qdiff")

# Last parts of the names of convolutions beside a residual block: in latent diffusion's networks, DDIM's, diffusers'.
_SHORTCUTS = ("skip_connection", "nin_shortcut", "conv_shortcut")
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
    network: nn.Module,
    config: QuantConfig,
    ends: tuple[str, str] | None,
    unused: Collection[str] = (),
    prefix: str = "",
) -> dict[str, str]:
    """Replace convolutions, linear layers and attention cores in place; parameters and hooks are kept.

    A layer is replaced only if its class computes what `QuantModule` computes. A module that is used in several
    places is replaced by one module in all of them. Of a parameter shared by several layers, all layers but the first
    get a copy, because each layer has its own integers and its own corrected bias.

    Args:
        ends: see `QuantConfig.of_layer`.
        unused: names of layers that no forward calls; they stay in float.
        prefix: of the layers' names, which `QuantConfig.layer_bits` leaves out.

    Returns:
        The reason why a layer with products stays in float, by layer name.

    Raises:
        UserError: `QuantConfig.layer_bits` names what is not replaced, or gives attention the width of a weight.
    """
    own_ends, children = without_prefix(ends, prefix), list(_children(network))
    check_layer_bits(network, config, ends, unused, prefix)
    left: dict[str, str] = {}
    replaced: dict[nn.Module, nn.Module] = {}
    parameters: set[int] = set()
    for parent, path, name, child in children:
        if child not in replaced:
            reason = "it is never called" if path in unused else why_not(child)
            if reason is not None:
                left[path] = reason
                continue
            if isinstance(child, AttentionCore):
                made: nn.Module = QuantAttention(child, config.of_attention(path.removeprefix(prefix)))
            else:
                for own in ("weight", "bias"):
                    parameter = getattr(child, own)
                    if parameter is not None and id(parameter) in parameters:
                        setattr(child, own, nn.Parameter(parameter.detach().clone()))
                    parameters.add(id(getattr(child, own)))
                made = QuantModule(
                    child, config.of_layer(path.removeprefix(prefix), own_ends), is_shortcut(path, child)
                )
            for hooks in _HOOKS:  # keep the same dicts, so that existing handles can still remove their hooks
                setattr(made, hooks, getattr(child, hooks))
            replaced[child] = made
        setattr(parent, name, replaced[child])
    if left:
        log.warning("%d layers stay in float: %s", len(left), first_few(left))
    if config.power_of_two_scales and not any(is_shortcut(path, child) for _, path, _, child in children):
        log.warning("%s has no shortcut convolutions, so --power_of_two_scales has no effect", type(network).__name__)
    return left


def is_shortcut(path: str, layer: nn.Module) -> bool:
    """Whether a layer is the convolution in the shortcut of a residual block, by the last part of its name."""
    return isinstance(layer, _ConvNd) and path.rpartition(".")[2] in _SHORTCUTS


def layer_places(network: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return where a float network has the layers that `replace_leaves` would replace, attention apart.

    Returns:
        (parent, attribute) of all places where a layer is used, by its first name.
    """
    names: dict[nn.Module, str] = {}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for parent, path, attribute, child in _children(network):
        if not isinstance(child, AttentionCore) and why_not(child) is None:
            found.setdefault(names.setdefault(child, path), []).append((parent, attribute))
    return found


def without_prefix(ends: tuple[str, str] | None, prefix: str) -> tuple[str, str] | None:
    """Return the names of the first and the last layer without a prefix."""
    return None if ends is None else tuple(name.removeprefix(prefix) for name in ends)


def check_layer_bits(
    network: nn.Module,
    config: QuantConfig,
    ends: tuple[str, str] | None,
    unused: Collection[str] = (),
    prefix: str = "",
) -> None:
    """Raise a `UserError` for the first entry of `QuantConfig.layer_bits` that a float network cannot have.

    Args:
        ends, unused, prefix: as for the network's wrapping.
    """
    if not config.layer_bits:
        return
    kind, own_ends = type(network).__name__, without_prefix(ends, prefix)
    found = {path.removeprefix(prefix): child for _, path, _, child in _children(network)}
    for name, bits in config.layer_bits:
        if name in (FIRST, LAST) and name not in found:
            if own_ends is None:
                raise UserError(f"the first and last layer of {kind} are not known; give --layer_bits their names")
        elif name not in found:
            near = ", ".join(difflib.get_close_matches(name, found, cutoff=0.0))
            raise UserError(f"--layer_bits names {name}, which is no layer of {kind}; give a layer's name, e.g. {near}")
        elif reason := "it is never called" if f"{prefix}{name}" in unused else why_not(found[name]):
            raise UserError(f"--layer_bits names {name}, which stays in float ({reason}); leave it out")
        elif isinstance(found[name], AttentionCore) and bits.weight_bits is not None:
            raise UserError(
                f"--layer_bits gives {name} {bits}, but attention has no weight; give it A{bits.act_bits or 8}"
            )


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
