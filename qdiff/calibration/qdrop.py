"""QDrop: while a unit is fitted, a random part of its inputs and activations stays in float (Wei et al., 2022)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from qdiff.quantizer import ActQuantizer


class Dropping:
    """Context manager: activation quantizers inside a module pass a random part of their input unchanged.

    Args:
        module: the unit.
        probability: probability that an element stays in float.
        generator: its state decides the masks; one number is drawn from it.
        device: where the module runs.
    """

    def __init__(self, module: nn.Module, probability: float, generator: torch.Generator, device: torch.device) -> None:
        self.probability = probability
        self.seed = int(torch.randint(1 << 62, (), generator=generator))
        # Masks are drawn on the device that uses them: moving a large mask takes longer than drawing it.
        self.generator = torch.Generator(device)
        self.quantizers = [m for m in module.modules() if isinstance(m, ActQuantizer)]
        self.passes = 0

    def feed(self, inputs: tuple[Tensor, ...], float_inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Begin a forward pass with new masks and return its inputs: a mix of quantized and float ones.

        Tensors that are not floating point (timesteps) are taken from ``inputs``.
        """
        self.passes += 1
        first = len(self.quantizers)
        return tuple(self._mix(first + i, *pair) for i, pair in enumerate(zip(inputs, float_inputs, strict=True)))

    def _mix(self, place: int, quantized: Tensor, in_float: Tensor) -> Tensor:
        """Take each element from ``in_float`` with the given probability, else from ``quantized``; equal shapes."""
        if not quantized.is_floating_point():
            return quantized
        # Only the pass and the place decide the mask: gradient checkpointing runs a block again in the backward pass
        # and must get the masks of the forward pass.
        self.generator.manual_seed(self.seed + (self.passes << 16) + place)
        drawn = torch.rand(quantized.shape, generator=self.generator, device=quantized.device)
        return torch.where(drawn < self.probability, in_float, quantized)

    def __enter__(self) -> Dropping:
        for place, quantizer in enumerate(self.quantizers):
            quantizer.dropping = partial(self._mix, place)
        return self

    def __exit__(self, *_: object) -> None:
        for quantizer in self.quantizers:
            quantizer.dropping = None
