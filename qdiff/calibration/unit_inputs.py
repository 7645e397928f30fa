"""What the layers of one unit take in the float network and in the quantized one."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.input_moments import InputMoments
from qdiff.calibration.observe import all_rows, announce, by_entry, observe
from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.walk import Walker, leaves_in_execution_order
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import calibrated_act_quantizers
from qdiff.ranges.estimators import RangeMethod

Taken = list[Tensor]
"""What a layer takes in its calls within one forward."""


class UnitInputs:
    """Inputs of a unit's layers, in stored tensors.

    The float network's do not depend on what is rounded, so one run of the unit collects those of all layers. The
    quantized network's do: each layer needs a run of its own, which ends behind that layer. Layers that take the very
    same tensor, as queries, keys and values do, share it.

    Args:
        activations: quantize activations as well as weights in the quantized network.
        act_range: how `observe` chooses ranges, a name in `qdiff.ranges.estimators.ESTIMATORS`.

    Attributes:
        leaves: the unit's quantized leaves with their names, in execution order.
    """

    def __init__(self, unit: Unit, walker: Walker, activations: bool, act_range: str = RangeMethod.MIN_MAX) -> None:
        self.unit, self.walker, self.activations, self.act_range = unit, walker, activations, act_range
        self.leaves = leaves_in_execution_order(unit.module, unit.inputs, walker)
        # Batches are in the order in which ranges are observed; with ranges per timestep, a batch has one timestep.
        groups = by_entry(walker, all_rows(unit, act_range))
        batches = [(entry, some[part], share) for entry, some in groups for part, share in walker.passes(len(some))]
        self._rows = [some for _, some, _ in batches]
        self._shares = [share for _, _, share in batches]
        self._groups = [(entry, [i for i, (e, *_) in enumerate(batches) if e == entry]) for entry, _ in groups]
        self._float: dict[nn.Module, list[Taken]] = {leaf: [] for _, leaf in self.leaves}
        self._quantized: tuple[nn.Module | None, list[Taken]] = None, []  # of the layer in work
        self._collect_float()
        alike: dict[tuple[int, ...], nn.Module] = {}
        self._first_with_input = {leaf: alike.setdefault(self._identity(leaf), leaf) for _, leaf in self.leaves}

    @property
    def layers(self) -> list[tuple[str, QuantModule]]:
        """The leaves that have a weight."""
        return [(name, leaf) for name, leaf in self.leaves if isinstance(leaf, QuantModule)]

    @property
    def repeats(self) -> bool:
        """Whether a leaf is called several times per forward, so that others may run between its calls."""
        return any(len(calls) > 1 for batches in self._float.values() for calls in batches)

    def float_inputs(self, layer: QuantModule) -> tuple[Tensor, Tensor]:
        """Return what a layer takes in the float network [M, …], stored, and the sample of each of its rows [M].

        Where its calls have several shapes, those of the first one's are returned. Without tokens that stay in float.
        """
        shape = layer.quantized_part(self._float[layer][0][0]).shape[1:]
        found = [
            (x, rows)
            for taken, rows in zip(self._float[layer], self._rows, strict=True)
            for x in map(layer.quantized_part, taken)
            if x.shape[1:] == shape
        ]
        inputs = self.walker.storage.empty((sum(len(x) for x, _ in found), *shape), found[0][0].dtype)
        torch.cat([x for x, _ in found], out=inputs)
        # Rows of a sample follow one another.
        samples = [rows[torch.arange(len(x), device=rows.device) * len(rows) // len(x)] for x, rows in found]
        return inputs, torch.cat(samples)

    @torch.no_grad()
    def observe(self, leaf: nn.Module) -> None:
        """Choose the ranges of a leaf's activation quantizers from what it takes in the quantized network.

        The leaves before it must have their ranges.
        """
        quantizers = list(calibrated_act_quantizers(leaf).values())
        if not quantizers:
            return

        def show(batches: list[int]) -> None:
            if not isinstance(leaf, QuantModule):
                self._run_past(leaf, batches)
                return
            taken = self._of_quantized(leaf)
            for batch in batches:
                announce(quantizers, self._shares[batch])
                for x in self._loaded(taken, batch):
                    leaf.quantized_input(x)

        if isinstance(leaf, QuantModule):
            self._of_quantized(leaf)  # before the quantizers observe, since it runs the layer's first calls
        observe(quantizers, self.act_range, self._groups, show)

    @torch.no_grad()
    def moments(self, layer: QuantModule, **kinds: Any) -> InputMoments:
        """Return the moments of a layer's inputs; its activation quantizers must have their ranges.

        Args:
            kinds: further arguments of `InputMoments`.
        """
        moments = InputMoments(layer, len(self.unit.target), **kinds)
        in_float, quantized = self._float[layer], self._of_quantized(layer)
        quantizes = self.activations and len(layer.act_quantizers) > 0
        first = 0
        for batch, rows in enumerate(self._rows):
            pairs = zip(self._loaded(in_float, batch), self._loaded(quantized, batch), strict=True)
            for x, x_hat in pairs:
                x_hat = layer.quantized_input(x_hat) if quantizes else layer.scaled_input(x_hat)
                moments.add(*map(layer.quantized_part, (layer.scaled_input(x), x_hat)), first)
            first += len(rows)
        return moments

    def _loaded(self, taken: list[Taken], batch: int) -> Iterator[Tensor]:
        """Yield a layer's inputs in one batch, on the network's device; quantizers take the ranges of the batch."""
        if self.walker.timesteps is not None:
            self.walker.timesteps.select(self._rows[batch], len(self.unit.target))
        for x in taken[batch]:
            yield x.to(self.walker.device)

    @torch.no_grad()
    def _collect_float(self) -> None:
        seen: dict[nn.Module, Taken] = {}
        # Tensors of this forward that are still there, their version then, and their copies.
        copies: list[tuple[weakref.ref[Tensor], int, Tensor]] = []

        def copy_of(x: Tensor) -> Tensor:
            for one, version, copy in copies:
                if one() is x and version == x._version:
                    return copy
            copies.append((weakref.ref(x), x._version, self._stored(x)))
            return copies[-1][2]

        def see(leaf: nn.Module, args: tuple[Tensor, ...]) -> None:
            # Attention is only counted.
            seen[leaf].append(copy_of(args[0]) if isinstance(leaf, QuantModule) else torch.empty(0))

        handles = [leaf.register_forward_pre_hook(see) for _, leaf in self.leaves]
        try:
            with leaf_modes([self.unit.module], weights=False, activations=False):
                for rows in self._rows:
                    seen.update({leaf: [] for _, leaf in self.leaves})
                    self.unit.module(*self.walker.load(self.unit.float_inputs, rows))
                    copies.clear()
                    for leaf, calls in seen.items():
                        self._float[leaf].append(calls)
        finally:
            for handle in handles:
                handle.remove()

    def _identity(self, leaf: nn.Module) -> tuple[int, ...]:
        """Return what is equal for layers that take the same tensors, before any of them has run."""
        batches = self._float[leaf]
        once = all(len(calls) == 1 for calls in batches)  # what a later call takes may depend on an earlier one
        return tuple(id(calls[0]) for calls in batches) if once else (id(leaf),)

    def _of_quantized(self, layer: QuantModule) -> list[Taken]:
        """Return what a layer takes in the quantized network, before its own quantizers, by batch."""
        first = self._first_with_input[layer]
        if self._quantized[0] is not first:
            self._quantized = None, []  # before the next is collected, so that only one is held
            self._quantized = first, self._run_past(first, list(range(len(self._rows))))
        return self._quantized[1]

    def _run_past(self, leaf: nn.Module, batches: list[int]) -> list[Taken]:
        """Run the quantized unit up to the last call of a leaf and return what the leaf takes in its calls.

        A layer's last call is not carried out; attention's is, for its quantizers, and what it takes is not kept.
        """
        taken: Taken = []
        found: list[Taken] = []
        last, quantizers = len(self._float[leaf][0]), calibrated_act_quantizers(leaf).values()

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            taken.append(self._stored(args[0]))
            if len(taken) == last:
                raise _Enough

        def count(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            taken.append(torch.empty(0))
            if len(taken) == last:
                raise _Enough

        hook: Callable = leaf.register_forward_pre_hook if isinstance(leaf, QuantModule) else leaf.register_forward_hook
        handle = hook(see if isinstance(leaf, QuantModule) else count)
        try:
            with leaf_modes([self.unit.module], weights=True, activations=self.activations):
                for batch in batches:
                    announce(quantizers, self._shares[batch])
                    with contextlib.suppress(_Enough):
                        self.unit.module(*self.walker.load(self.unit.inputs, self._rows[batch]))
                    found.append(taken.copy())
                    taken.clear()
        finally:
            handle.remove()
        return found

    def _stored(self, x: Tensor) -> Tensor:
        """Return a copy, because what runs beside a layer may change its input in place."""
        return self.walker.storage.empty(tuple(x.shape), x.dtype).copy_(x)


class _Enough(Exception):
    """Ends a forward of a unit after the last call of the leaf that is looked at."""
