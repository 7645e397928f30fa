"""What the layers of one unit take in the float network and in the quantized one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.calibration.input_moments import InputMoments
from qdiff.calibration.observe import observing
from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.walk import Walker, leaves_in_execution_order
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import calibrated_act_quantizers

Batches = list[list[Tensor]]
"""Inputs of a layer: by batch of samples, and by call within a forward."""


class UnitInputs:
    """Inputs of a unit's layers, in stored tensors.

    The float network's do not depend on what is rounded, so one run of the unit collects those of all layers. The
    quantized network's do: each layer needs a run of its own, which ends behind that layer.

    Args:
        activations: quantize activations as well as weights in the quantized network.

    Attributes:
        leaves: the unit's quantized leaves with their names, in execution order.
    """

    def __init__(self, unit: Unit, walker: Walker, activations: bool) -> None:
        self.unit, self.walker, self.activations = unit, walker, activations
        self.leaves = leaves_in_execution_order(unit.module, unit.inputs, walker)
        self._float: dict[nn.Module, Batches] = {leaf: [] for _, leaf in self.leaves}
        self._quantized: tuple[nn.Module | None, Batches] = None, []  # of the layer in work
        self._collect_float()

    @property
    def layers(self) -> list[tuple[str, QuantModule]]:
        """The leaves that have a weight."""
        return [(name, leaf) for name, leaf in self.leaves if isinstance(leaf, QuantModule)]

    @property
    def repeats(self) -> bool:
        """Whether a leaf is called several times per forward, so that others may run between its calls."""
        return any(len(calls) > 1 for batches in self._float.values() for calls in batches)

    @torch.no_grad()
    def observe(self, leaf: nn.Module, method: str) -> None:
        """Choose the ranges of a leaf's activation quantizers from what it takes in the quantized network.

        The leaves before it must have their ranges.

        Args:
            method: a name in `qdiff.ranges.estimators.ESTIMATORS`.
        """
        quantizers = list(calibrated_act_quantizers(leaf).values())
        if not quantizers:
            return
        with observing(quantizers, method):
            if isinstance(leaf, QuantModule):
                for _, calls in self._batches(self._of_quantized(leaf)):
                    for x in calls:
                        leaf.quantized_input(x)
            else:
                self._run_past(leaf)

    @torch.no_grad()
    def moments(self, layer: QuantModule, **kinds: Any) -> InputMoments:
        """Return the moments of a layer's inputs; its activation quantizers must have their ranges.

        Args:
            kinds: further arguments of `InputMoments`.
        """
        moments = InputMoments(layer, len(self.unit.target), **kinds)
        in_float, quantized = self._float[layer], self._of_quantized(layer)
        quantizes = self.activations and len(layer.act_quantizers) > 0
        for (rows, calls), (_, inputs) in zip(self._batches(in_float), self._batches(quantized), strict=True):
            for x, x_hat in zip(calls, inputs, strict=True):
                moments.add(x, layer.quantized_input(x_hat) if quantizes else x_hat, rows.start)
        return moments

    def _batches(self, batches: Batches) -> Iterator[tuple[slice, list[Tensor]]]:
        """Yield the samples of each batch and the layer's inputs on the device of the network."""
        for rows, calls in zip(self.walker.slices(len(self.unit.target)), batches, strict=True):
            yield rows, [x.to(self.walker.device) for x in calls]

    @torch.no_grad()
    def _collect_float(self) -> None:
        seen: dict[nn.Module, list[Tensor]] = {}

        def see(leaf: nn.Module, args: tuple[Tensor, ...]) -> None:
            # Attention is only counted.
            seen[leaf].append(self._stored(args[0]) if isinstance(leaf, QuantModule) else torch.empty(0))

        handles = [leaf.register_forward_pre_hook(see) for _, leaf in self.leaves]
        try:
            with leaf_modes([self.unit.module], weights=False, activations=False):
                for rows in self.walker.slices(len(self.unit.target)):
                    seen.update({leaf: [] for _, leaf in self.leaves})
                    self.unit.module(*self.walker.load(self.unit.float_inputs, rows))
                    for leaf, calls in seen.items():
                        self._float[leaf].append(calls)
        finally:
            for handle in handles:
                handle.remove()

    def _of_quantized(self, layer: QuantModule) -> Batches:
        """Return what a layer takes in the quantized network, before its own quantizers."""
        if self._quantized[0] is not layer:
            self._quantized = None, []  # before the next is collected, so that only one is held
            self._quantized = layer, self._run_past(layer)
        return self._quantized[1]

    def _run_past(self, leaf: nn.Module) -> Batches:
        """Run the quantized unit up to the last call of a leaf and return what the leaf takes in its calls.

        A layer's last call is not carried out; attention's is, for its quantizers, and what it takes is not kept.
        """
        taken: list[Tensor] = []
        last = len(self._float[leaf][0])
        batches: Batches = []

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
                for rows in self.walker.slices(len(self.unit.target)):
                    with contextlib.suppress(_Enough):
                        self.unit.module(*self.walker.load(self.unit.inputs, rows))
                    batches.append(taken.copy())
                    taken.clear()
        finally:
            handle.remove()
        return batches

    def _stored(self, x: Tensor) -> Tensor:
        """Return a copy, because what runs beside a layer may change its input in place."""
        return self.walker.storage.empty(tuple(x.shape), x.dtype).copy_(x)


class _Enough(Exception):
    """Ends a forward of a unit after the last call of the leaf that is looked at."""
