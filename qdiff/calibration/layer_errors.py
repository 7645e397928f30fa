"""The errors of the layers inside a block, beside the block's own (EDA-DM's fine-grained block reconstruction)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qdiff.calibration.objectives import lp_error
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule


class LayerErrors:
    """Compares every quantized layer inside a block but its last with the float one, on the same batch.

    The last layer's error is the block's error, near enough: counting it twice would only weigh the block more.
    Layers come in the order in which a forward reaches them; a block with one layer has nothing to compare.

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
        """Run the block in float, then note what its layers give in the forward inside the block of code.

        Args:
            float_inputs: the batch as the float network feeds it.
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
        handles = [layer.register_forward_hook(lambda _, __, output: outputs.append(output)) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def error(self) -> Tensor | float:
        """Return Σ over layers of the squared error, summed over channels and averaged; 0 without such layers."""
        pairs = list(zip(self.found, self.wanted, strict=True))[:-1]
        error, self.found, self.wanted = lp_error(2.0), [], []
        return sum(error(found, wanted, None) for found, wanted in pairs)
