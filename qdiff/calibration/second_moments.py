"""Second moments of a layer's inputs, summed batch by batch: what rounding a weight column by column is decided by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.functional import at_least_single
from qdiff.quant_layer import QuantModule

PATCH_BYTES = 1 << 26  # bytes of patches that are unfolded at a time


def columns_of(layer: QuantModule) -> int:
    """Return K, the number of weights that one output sums over: C_in/groups · kernel size."""
    return layer.weight[0].numel()


def groups_of(layer: QuantModule) -> int:
    """Return the number of groups G; 1 for a linear layer."""
    return 1 if layer.geometry is None else layer.geometry.groups


def input_rows(layer: QuantModule, x: Tensor) -> Tensor:
    """Return what the layer multiplies its weight with at every position (im2col).

    Args:
        layer: has the kernel, padding, stride, dilation and groups.
        x: [N, …, C_in] for a linear layer, [N, C_in, …] for a convolution.

    Returns:
        [N, positions, G, K]; group g of the output is rows[:, :, g] · weight[g-th C_out/G rows].flatten(1)ᵀ.
    """
    x = at_least_single(x)
    if layer.geometry is None:
        return x.reshape(len(x), -1, 1, x.shape[-1])
    where, kernel = layer.geometry, tuple(layer.weight.shape[2:])
    x = F.pad(x, _padding(where.padding, kernel, where.dilation))
    stride, dilation = where.stride, where.dilation
    if len(kernel) == 1:  # F.unfold takes images only
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    patches = F.unfold(x, kernel, dilation=dilation, stride=stride)  # [N, C_in · kernel, positions]
    return patches.unflatten(1, (where.groups, -1)).permute(0, 3, 1, 2)


def _padding(padding: tuple[int, ...] | str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Return the zeros before and after every dimension in the order of `F.pad`: the last dimension first."""
    if padding == "valid":
        return [0, 0] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [side for pad in reversed(padding) for side in (pad, pad)]


class SecondMoments:
    """H = (2/n) Σ x̂x̂ᵀ and D = (2/n) Σ (x − x̂)x̂ᵀ of a layer, over samples, positions and calls; each [G, K, K] float64.

    x̂ is the layer's input in the quantized network, its own activation quantizer included; x is the float network's.

    Args:
        layer: the layer.
        samples: number of samples that will be added in all.
        most_rows: most input rows to use; more are thinned out evenly, with other positions in every sample. None uses
            all of them. How samples are batched makes no difference.
        cross: whether D is needed; without it `cross` is None.
    """

    def __init__(self, layer: QuantModule, samples: int, most_rows: int | None = None, cross: bool = True) -> None:
        self.layer, self.samples, self.most_rows = layer, samples, most_rows
        groups, columns, device = groups_of(layer), columns_of(layer), layer.weight.device
        self._inputs = torch.zeros(groups, columns, columns, dtype=torch.float64, device=device)
        self._cross = torch.zeros_like(self._inputs) if cross else None
        self.count = 0

    @torch.no_grad()
    def add(self, x: Tensor, quantized: Tensor, first: int = 0) -> None:
        """Add the inputs of one call.

        Args:
            x, quantized: x and x̂ of the same samples, in the shape that the layer takes.
            first: number of the first of these samples among all.
        """
        for start, size in self._parts(x):
            rows = self._thinned(quantized[start : start + size], first + start)
            self.count += rows.shape[1]
            self._inputs += (rows.mT @ rows).double()
            if self._cross is not None:
                difference = self._thinned(x[start : start + size], first + start) - rows
                self._cross += (difference.mT @ rows).double()

    def _parts(self, x: Tensor) -> Iterator[tuple[int, int]]:
        """Yield (start, size) of the samples that are unfolded together."""
        one = input_rows(self.layer, x[:1]).numel() * max(4, x.element_size())
        size = max(1, PATCH_BYTES // max(1, one))
        for start in range(0, len(x), size):
            yield start, min(size, len(x) - start)

    def _thinned(self, x: Tensor, first: int) -> Tensor:
        """Return the chosen rows, [G, rows, K]."""
        rows = input_rows(self.layer, x)
        positions = rows.shape[1]
        every = 1 if self.most_rows is None else -(-self.samples * positions // self.most_rows)
        if every > 1:
            sample = torch.arange(first, first + len(rows), device=rows.device)
            chosen = (sample[:, None] + torch.arange(positions, device=rows.device)) % every == 0
            return rows[chosen].transpose(0, 1)
        return rows.flatten(0, 1).transpose(0, 1)

    @property
    def inputs(self) -> Tensor:
        """H, [G, K, K]."""
        return self._inputs * (2 / max(1, self.count))

    @property
    def cross(self) -> Tensor | None:
        """D, [G, K, K], or None."""
        return None if self._cross is None else self._cross * (2 / max(1, self.count))
