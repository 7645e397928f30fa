"""Ranges per timestep in a component of a pipeline, whose loop calls the network without us."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.diffusers_backend.denoiser import TIME
from qdiff.quantizer import TimestepActQuantizer, share_timesteps


def make_timesteps(network: nn.Module, values: list[float]) -> None:
    """Give the quantizers of a network that is not filled yet a place for ranges at these timesteps."""
    shared = share_timesteps(network)
    if shared is None:
        return
    shared.set(torch.tensor(values))
    for quantizer in _quantizers(network):
        quantizer.resize(len(values))


def follow_timesteps(network: nn.Module) -> None:
    """Have every call of a network take the ranges of the timestep that it is called with; may be called twice.

    On a GPU a call waits for its timestep, to raise an error if it has no range. The loops of diffusers wait there
    anyway, because most schedulers look it up in tables.
    """
    if _quantizers(network) and _follow not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(_follow, with_kwargs=True)


def _quantizers(network: nn.Module) -> list[TimestepActQuantizer]:
    return [m for m in network.modules() if isinstance(m, TimestepActQuantizer)]


def timestep_of(network: nn.Module, args: tuple, keywords: dict[str, Any]) -> Tensor:
    """Return the timestep of a call, [N] or [1]."""
    names = list(inspect.signature(type(network).forward).parameters)[1:]
    return torch.as_tensor({**dict(zip(names, args, strict=False)), **keywords}[TIME]).reshape(-1)


def _follow(network: nn.Module, args: tuple, keywords: dict[str, Any]) -> None:
    first = _quantizers(network)[0]
    shared, t = first.timesteps, timestep_of(network, args, keywords)
    if shared.values.device != first.delta.device:
        shared.to(first.delta.device)
    shared.check(t)
    shared.rows = shared.entries(t.to(shared.values.device))
