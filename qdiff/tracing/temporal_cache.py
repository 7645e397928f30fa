"""What a network computes from the timestep alone, computed once per timestep and looked up afterwards.

Source: Huang et al. 2024, "TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models", the journal
version: a run has finitely many timesteps, so the outputs of the time embedding and of its projections are constants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.config import FLOAT_BITS, LayerBits, QuantConfig, ScalePer
from qdiff.errors import UserError
from qdiff.interface import SteppedNetwork, TemporalParts, family_of, temporal_parts_of
from qdiff.ranges.calibrated_timesteps import CalibratedTimesteps, at_timestep


@contextlib.contextmanager
def cached_temporal(network: nn.Module, timesteps: Iterable[float] = ()) -> Iterator[TemporalCache]:
    """Compute what depends on t alone once per timestep inside the block, and look it up in every later call.

    The layers themselves compute what is kept, in their current mode and on as many rows as the batch has, so every
    call returns what it returned without the cache. Inside the block, weights, biases and ranges must not change. A
    copy that is made there has a cache of its own.

    Args:
        network: a `QuantModel`, or a float network.
        timesteps: those that the network will be called at. On a GPU, a call then needs not wait for the device to
            learn its timesteps; without them, it does. On the CPU they make no difference.

    Raises:
        UserError: it is not known what depends on t alone, or these layers' outputs depend on more than t. At the end
            of the block: on a GPU, a call had a timestep that was not given (its outputs are NaN).
        RuntimeError: the network has a cache already.
    """
    stepped = _stepped(network)
    parts = _parts_of(network)
    layers = [stepped.get_submodule(name) for name in _names(parts)]
    if any("forward" in vars(layer) for layer in layers):
        raise RuntimeError("the outputs of this network's time embedding are given already; end that block first")
    check_temporal(network, network.config if stepped is not network else None)
    cache = TemporalCache(stepped, parts, timesteps, getattr(network, "act_timesteps", None))
    hooks = (
        stepped.register_forward_pre_hook(cache.begin),
        stepped.register_forward_hook(cache.end, always_call=True),
    )
    for index, layer in enumerate(layers):
        layer.forward = _LookedUp(cache, index, layer.forward)
    try:
        yield cache
    finally:
        for layer in layers:
            del layer.forward
        for hook in hooks:
            hook.remove()
    cache.check()


def is_cached(network: nn.Module) -> bool:
    """Whether a module has layers whose outputs are looked up."""
    return any(isinstance(vars(module).get("forward"), _LookedUp) for module in network.modules())


def temporal_layers(network: nn.Module) -> list[str]:
    """Return the names of the layers that compute from the timestep alone.

    Raises:
        UserError: they are not known.
    """
    return _names(_parts_of(network))


def check_temporal(network: nn.Module, config: QuantConfig | None) -> None:
    """Check that everything in a network that should depend on t alone does so with a config.

    Args:
        network: wrapped with this config, or a float network that will be.
        config: None for a network that stays in float.

    Raises:
        UserError: it is not known what depends on t alone; or one of these layers depends on earlier calls or on the
            whole batch.
    """
    names, family = temporal_layers(network), family_of(_stepped(network))
    if config is None or not (config.act_dynamic or config.modulate):
        return
    for name in names:
        own = config.of_layer(name.removeprefix(family.prefix), None)
        if own.modulate:
            raise UserError(
                f"--modulate makes the output of {name} depend on the steps before, and not on t alone; leave out "
                "--cache_temporal, or give --cache_temporal float"
            )
        if own.act_dynamic and own.act_scale_per is not ScalePer.SAMPLE:
            raise UserError(
                f"with one dynamic range per {own.act_scale_per.value}, the output of {name} depends on the whole "
                "batch, and not on t alone; add --act_scale_per sample, or give --cache_temporal float"
            )


def with_float_temporal(config: QuantConfig, network: nn.Module) -> QuantConfig:
    """Return a config that leaves everything in float that depends on the timestep alone.

    Raises:
        UserError: it is not known what depends on t alone, or ``layer_bits`` gives one of these layers a width.
    """
    prefix, given, floats = family_of(_stepped(network)).prefix, dict(config.layer_bits), (None, FLOAT_BITS)
    names = [name.removeprefix(prefix) for name in temporal_layers(network)]
    for name in names:
        bits = given.get(name, LayerBits())
        if bits.weight_bits not in floats or bits.act_bits not in floats:
            raise UserError(
                f"--layer_bits gives {name} {bits}, but --cache_temporal float leaves it in float; leave one of the "
                "two out"
            )
    return replace(config, layer_bits={**given, **dict.fromkeys(names, LayerBits(FLOAT_BITS, FLOAT_BITS))})


class TemporalCache:
    """Outputs of the layers that depend on t alone, by timestep. They fill a table for each kind of call.

    Args:
        network: the network; its forward calls `begin` and `end`.
        parts: what in it depends on t alone.
        timesteps: see `cached_temporal`.
        ranges: the timesteps of ranges per timestep, or None.
    """

    def __init__(
        self,
        network: SteppedNetwork,
        parts: TemporalParts,
        timesteps: Iterable[float],
        ranges: CalibratedTimesteps | None,
    ) -> None:
        self.network, self.parts, self.ranges = network, parts, ranges
        self.layers = [network.get_submodule(name) for name in _names(parts)]
        self.timesteps = list(dict.fromkeys(float(t) for t in timesteps))
        self.outputs: tuple[Tensor, ...] | None = None  # of each layer, for the call in work
        self._tables: dict[tuple[Any, ...], _Table] = {}
        self._missed: Tensor | None = None  # on a GPU: whether a call had a timestep that no table has

    @property
    def size_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.rows.nbytes for table in self._tables.values() if table.index)

    def begin(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Look up the outputs for a call of the network with (x, t, …), and compute those that are missing first."""
        x, t = inputs[:2]
        if x.is_meta or t.is_meta:  # a pass that only asks for shapes
            return
        table = self._tables.setdefault(self._kind_of_call(x, t), _Table())
        is_known = t.device.type != "cpu" and len(self.timesteps) > 0
        called = self.timesteps if is_known else [float(value) for value in t.tolist()]
        for value in dict.fromkeys(called):
            if value not in table.index:
                table.add(value, self._compute(value, inputs))
        self.outputs = self._on_device(table, t) if is_known else table.at(called)

    def end(self, *_: Any) -> None:
        """Forget the outputs of the call, so that a layer that is called by itself computes."""
        self.outputs = None

    def check(self) -> None:
        """Raise a `UserError` if a call on a GPU had a timestep that was not given; waits for the GPU."""
        missed, self._missed = self._missed, None
        if missed is not None and missed.item():
            raise UserError(
                "the network was called at a timestep that its temporal cache was not given; give all timesteps of "
                "sampling, or none"
            )

    def _kind_of_call(self, x: Tensor, t: Tensor) -> tuple[Any, ...]:
        """Return what decides the bits of an output besides t.

        The number of rows is one of these: a product of one row is summed in another order than one of many.
        """
        device = t.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        names = ("weights_quantized", "acts_quantized", "in_quantized_network")
        modes = (vars(layer).get(name) for layer in self.layers for name in names)
        return t.shape, t.dtype, t.device, x.dtype, autocast, *modes

    @torch.no_grad()
    def _compute(self, value: float, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the output of every layer at one timestep, [1, C_i], computed on as many rows as the batch has."""
        x, t, *others = inputs
        same = torch.full_like(t, value)
        found = []
        with at_timestep(self.ranges, (x, same)):
            state = self.network.start(x, same, *others)
            for step in self.network.steps():
                if step.name in self.parts.steps:
                    step(state)
                    found.append(state[self.parts.key])
            activated = self.parts.activation(state[self.parts.key])
            found += [projection(activated) for projection in self.layers[len(found) :]]
        return [output[:1] for output in found]

    def _on_device(self, table: _Table, t: Tensor) -> tuple[Tensor, ...]:
        """Look up t without reading it; rows of other timesteps are NaN."""
        same = t[:, None] == table.values_like(t)
        found = same.any(dim=1, keepdim=True)
        missed = ~found.all()
        self._missed = missed if self._missed is None else self._missed | missed
        rows = table.rows.index_select(0, same.int().argmax(dim=1))
        return rows.masked_fill(~found, torch.nan).split(table.widths, dim=1)


class _Table:
    """Rows of outputs, those of all layers side by side, by timestep.

    Attributes:
        index: row of each timestep.
        rows: [timesteps, Σ C_i].
        widths: C_i of each layer.
    """

    def __init__(self) -> None:
        self.index: dict[float, int] = {}
        self.rows = torch.empty(0)
        self.widths: list[int] = []
        self._values: Tensor | None = None

    def add(self, value: float, outputs: list[Tensor]) -> None:
        row = torch.cat(outputs, dim=1)
        self.rows = torch.cat([self.rows, row]) if self.index else row
        self.widths, self._values = [output.shape[1] for output in outputs], None
        self.index[value] = len(self.index)

    def at(self, timesteps: list[float]) -> tuple[Tensor, ...]:
        """Return each layer's output for timesteps that are in the table, [N, C_i]."""
        found = [self.index[value] for value in timesteps]
        if len(set(found)) == 1:  # while sampling; a view, without a copy
            return self.rows[found[0]].expand(len(found), -1).split(self.widths, dim=1)
        return self.rows[found].split(self.widths, dim=1)

    def values_like(self, t: Tensor) -> Tensor:
        """Return the timesteps [1, T], on the device and in the dtype of t."""
        if self._values is None:
            self._values = torch.tensor([list(self.index)], dtype=t.dtype, device=t.device)
        return self._values


class _LookedUp:
    """The forward of a layer whose output is looked up during a call of the network, and computed otherwise."""

    def __init__(self, cache: TemporalCache, index: int, compute: Callable[[Tensor], Tensor]) -> None:
        self.cache, self.index, self.compute = cache, index, compute

    def __call__(self, x: Tensor) -> Tensor:
        outputs = self.cache.outputs
        return self.compute(x) if outputs is None else outputs[self.index]


def _stepped(network: nn.Module) -> nn.Module:
    """Return a wrapped network, or a network that is not wrapped."""
    return network if isinstance(network, SteppedNetwork) else getattr(network, "model", network)


def _parts_of(network: nn.Module) -> TemporalParts:
    stepped = _stepped(network)
    parts = temporal_parts_of(stepped)
    if parts is None:
        raise UserError(
            f"it is not known what {type(stepped).__name__} computes from the timestep alone; leave out "
            "--cache_temporal"
        )
    return parts


def _names(parts: TemporalParts) -> list[str]:
    return [*parts.steps, *parts.projections]
