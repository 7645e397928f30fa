"""The errors of the layers inside a block, in addition to the block's own (EDA-DM's fine-grained reconstruction)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qdiff.calibration.objectives import lp_error
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule


class LayerErrors:
    """Compares every quantized layer of a block except the last with its float output on the same batch.

    The last layer's error is nearly the block's error, so counting it too would only give the block more weight. Layers
    are in execution order; a block with one layer has nothing to compare.

    Args:
        module: the block.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers = [m for m in module.modules() if isinstance(m, QuantModule)]
        self.wanted: list[Tensor] = []
        self.found: list[Tensor] = []

    @contextlib.contextmanager
    def watch(self, float_inputs: tuple[Tensor, ...]) -> Iterator[None]:
        """Run the block in float, then record its layers' outputs during the forward pass inside the ``with`` block.

        Args:
            float_inputs: the block's inputs in the float network, for this batch.
        """
        with torch.no_grad(), leaf_modes([self.module], weights=False, activations=False):
            self.wanted = []
            with self._noting(self.wanted):
                self.module(*float_inputs)
        self.found = []
        with self._noting(self.found):
            yield

    @contextlib.contextmanager
    def _noting(self, outputs: list[Tensor]) -> Iterator[None]:
        # Cloned, because what follows a layer may change its output in place.
        note = lambda _, __, output: outputs.append(output.clone())  # noqa: E731
        handles = [layer.register_forward_hook(note) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def error(self) -> Tensor | float:
        """Return Σ over layers of the squared error, summed over channels, averaged over the rest; 0 without layers."""
        pairs = list(zip(self.found, self.wanted, strict=True))[:-1]
        error, self.found, self.wanted = lp_error(2.0), [], []
        return sum(error(found, wanted, None) for found, wanted in pairs)
