"""Random weights for measuring time and memory of full-size networks; activations stay of order 1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.errors import UserError


def random_values(like: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Return float32 values for a parameter: kernels of variance 1/fan-in, norms the identity, biases 0.

    Args:
        like: a tensor of the parameter's shape; its values are not used.
        name: dotted name; one-dimensional parameters called ``weight`` are those of norms.
    """
    if like.dim() == 1:
        return torch.full(like.shape, float(name.endswith("weight")))
    return torch.randn(like.shape, generator=generator) * like[0].numel() ** -0.5


@torch.no_grad()
def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Move a network from the meta device to the CPU and fill it with random values.

    Raises:
        UserError: the network has buffers, for which random values make no sense.
    """
    network = network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        parameter.copy_(random_values(parameter, name, generator))
    if next(network.buffers(), None) is not None:
        raise UserError(f"{type(network).__name__} has buffers, which random weights do not fill; use --cali_ckpt")
    return network
