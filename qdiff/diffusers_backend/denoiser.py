"""The denoising network of a pipeline, and how the pipeline calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from qdiff.errors import UserError
from qdiff.quant_layer import QUANTIZABLE, QuantModule

NAMES = ("unet", "transformer")  # what diffusers calls the denoising component
TIME = "timestep"
CONSTANTS = ("img_ids", "txt_ids")  # positions of tokens: the same for all samples


def find_denoiser(pipe: Any, name: str | None = None) -> tuple[str, nn.Module]:
    """Return the name and the module of the component to quantize.

    Args:
        pipe: a ``DiffusionPipeline``.
        name: None takes the denoising network.

    Raises:
        UserError: there is no such component, or it is compiled or not a network that denoises.
    """
    components = {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}
    if name is None:
        name = next((n for n in NAMES if n in components), None)
        if name is None:
            raise UserError(f"{type(pipe).__name__} has no {' or '.join(NAMES)}; name the component to quantize")
    if name not in components:
        raise UserError(
            f"{type(pipe).__name__} has no network {name}; name one of its components: {', '.join(components)}"
        )
    network = components[name]
    if hasattr(network, "_orig_mod"):
        raise UserError(f"{name} is compiled; quantize it first and compile it then")
    if not any(isinstance(m, (*QUANTIZABLE, QuantModule)) for m in network.modules()):
        raise UserError(f"{name} has no layer to quantize; name one of the components {', '.join(components)}")
    if TIME not in inspect.signature(network.forward).parameters:
        raise UserError(
            f"{name} is of type {type(network).__name__}, whose forward takes no {TIME}; name a component that "
            "denoises, or quantize this network with qdiff.QuantModel"
        )
    return name, network


@dataclass(frozen=True)
class DenoiserCall:
    """How a pipeline calls its denoising network: which arguments are samples, and what the others are.

    ``call(network, x, t, *conditions)`` runs the network on batch-first tensors and returns its output; several outputs
    (of a ControlNet) are joined into one tensor [N, values].

    Attributes:
        leaves: the arguments' leaves; None where an input goes.
        places: indices of the inputs among the leaves, x and t first.
        names: their names, e.g. ``added_cond_kwargs.text_embeds``.
        spec: how the leaves nest.
    """

    leaves: tuple[Any, ...]
    places: tuple[int, ...]
    names: tuple[str, ...]
    spec: TreeSpec

    def __deepcopy__(self, memo: dict) -> DenoiserCall:
        return self  # it never changes

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        filled = [leaf.to(inputs[0].device) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        for place, value in zip(self.places, inputs, strict=True):
            filled[place] = value
        arguments = tree_unflatten(filled, self.spec)
        outputs, _ = tree_flatten(network(**{**arguments, "return_dict": False}))
        outputs = [output for output in outputs if isinstance(output, Tensor)]
        return outputs[0] if len(outputs) == 1 else torch.cat([output.flatten(1) for output in outputs], dim=1)


def read_call(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[DenoiserCall, tuple[Tensor, ...]]:
    """Divide the arguments of a call into samples and constants.

    Returns:
        The call, and its inputs (x, t, conditions…), one row per sample; floats are float32 at least.

    Raises:
        UserError: the network is not called with a batch of samples and their timestep.
    """
    signature = inspect.signature(type(network).forward)  # the network's own may be wrapped by hooks
    bound = signature.bind(network, *args, **kwargs).arguments
    _, first = list(signature.parameters)[:2]
    arguments = {n: v for n, v in list(bound.items())[1:] if v is not None and n != "return_dict"}
    arguments |= arguments.pop("kwargs", {})
    if not isinstance(arguments.get(first), Tensor) or TIME not in arguments:
        raise UserError(
            f"{type(network).__name__} is called without {first} or {TIME}; quantize this network with qdiff.QuantModel"
        )
    count = len(arguments[first])
    arguments[TIME] = _per_sample(arguments[TIME], count, arguments[first].device)
    paths, spec = tree_flatten_with_path(arguments)
    names = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    batched = [
        i
        for i, (name, leaf) in enumerate(zip(names, leaves, strict=True))
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count and name not in CONSTANTS
    ]
    batched.sort(key=lambda i: (names[i] != first, names[i] != TIME))
    inputs = tuple(_at_least_single(leaves[i]) for i in batched)
    constants = [_at_least_single(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    kept = tuple(None if i in batched else leaf for i, leaf in enumerate(constants))
    return DenoiserCall(kept, tuple(batched), tuple(names[i] for i in batched), spec), inputs


def _per_sample(timestep: Any, count: int, device: torch.device) -> Tensor:
    t = torch.as_tensor(timestep, device=device)
    return t.reshape(-1).expand(count) if t.numel() == 1 else t


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def listen(network: nn.Module, heard: Callable[[tuple, dict], None]) -> Any:
    """Call ``heard(args, kwargs)`` before every call of a network; returns the hook's handle."""
    return network.register_forward_pre_hook(lambda _, args, kwargs: heard(args, kwargs), with_kwargs=True)
