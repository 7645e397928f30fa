"""Moments of a layer's inputs in the float and in the quantized network, summed batch by batch."""

from __future__ import annotations

import math
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


def input_patches(layer: QuantModule, x: Tensor) -> Tensor:
    """Return what the layer multiplies its weight with at every position, as a view where that is possible.

    Args:
        layer: has the kernel, padding, stride, dilation and groups.
        x: [N, …, C_in] for a linear layer, [N, C_in, …] for a convolution.

    Returns:
        [N, *positions, G, *weights]; a linear layer has one dimension of positions, and ``weights`` is (C_in,); for a
        convolution it is (C_in/G, *kernel).
    """
    x = at_least_single(x)
    if layer.geometry is None:
        return x.reshape(len(x), -1, 1, x.shape[-1])
    where, kernel = layer.geometry, tuple(layer.weight.shape[2:])
    x = F.pad(x, _padding(where.padding, kernel, where.dilation)).contiguous()
    (count, channels, *sizes), (by_sample, by_channel, *by_position) = x.shape, x.stride()
    steps = list(zip(sizes, kernel, where.stride, where.dilation, by_position, strict=True))
    positions = [(size - dilation * (width - 1) - 1) // stride + 1 for size, width, stride, dilation, _ in steps]
    in_group = channels // where.groups
    return x.as_strided(
        (count, *positions, where.groups, in_group, *kernel),
        (
            by_sample,
            *(stride * by for _, _, stride, _, by in steps),
            by_channel * in_group,
            by_channel,
            *(dilation * by for _, _, _, dilation, by in steps),
        ),
    )


def input_rows(layer: QuantModule, x: Tensor) -> Tensor:
    """Return `input_patches` as rows [N, positions, G, K] (im2col).

    Group g of the output is rows[:, :, g] · weight[g-th C_out/G rows].flatten(1)ᵀ.
    """
    patches = input_patches(layer, x)
    return patches.reshape(len(x), -1, layer.groups, columns_of(layer))


def _padding(padding: tuple[int, ...] | str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Return the zeros before and after every dimension in the order of `F.pad`: the last dimension first."""
    if padding == "valid":
        return [0, 0] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [side for pad in reversed(padding) for side in (pad, pad)]


class InputMoments:
    """Means, H = (2/n) Σ x̂x̂ᵀ and D = (2/n) Σ (x − x̂)x̂ᵀ of a layer's inputs, over samples, positions and calls.

    x̂ is the layer's input in the quantized network, its own activation quantizer included; x is the float network's.
    All results are float64.

    Args:
        layer: the layer.
        samples: number of samples that will be added in all.
        most_rows: most input rows to use for H and D; more are thinned out evenly, with other positions in every
            sample. None uses all of them, and the means always do. How samples are batched makes no difference.
        second: whether H is needed.
        cross: whether D is needed as well.
    """

    def __init__(
        self,
        layer: QuantModule,
        samples: int,
        most_rows: int | None = None,
        *,
        second: bool = True,
        cross: bool = True,
    ) -> None:
        self.layer, self.samples, self.most_rows = layer, samples, most_rows
        groups, columns = layer.groups, columns_of(layer)
        self._sums = [self._zeros(groups, columns) for _ in range(2)]
        self._inputs = self._zeros(groups, columns, columns) if second else None
        self._cross = self._zeros(groups, columns, columns) if second and cross else None
        self.rows = self.used = 0

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self.layer.weight.device)

    @torch.no_grad()
    def add(self, x: Tensor, quantized: Tensor, first: int = 0) -> None:
        """Add the inputs of one call.

        Args:
            x, quantized: x and x̂ of the same samples, in the shape that the layer takes.
            first: number of the first of these samples among all.
        """
        positions = math.prod(input_patches(self.layer, x[:1]).shape[1 : -self.layer.weight.dim()])
        every = 1 if self.most_rows is None else -(-self.samples * positions // self.most_rows)
        for part in self._parts(x, positions, every):
            pair = [input_patches(self.layer, t[part]) for t in (x, quantized)]
            self.rows += len(pair[0]) * positions
            for total, patches in zip(self._sums, pair, strict=True):
                # Positions first, in the patches' own precision: converting every patch to float64 takes far longer.
                by_sample = patches.sum(dim=tuple(range(1, patches.dim() - self.layer.weight.dim())))
                total += by_sample.sum(dim=0, dtype=torch.float64).view_as(total)
            if self._inputs is not None:
                self._add_products(*(self._thinned(patches, first + part.start, every) for patches in pair))

    def _add_products(self, x: Tensor, quantized: Tensor) -> None:
        self.used += quantized.shape[1]
        self._inputs += (quantized.mT @ quantized).double()
        if self._cross is not None:
            self._cross += ((x - quantized).mT @ quantized).double()

    def _parts(self, x: Tensor, positions: int, every: int) -> Iterator[slice]:
        """Yield the samples whose rows are copied together."""
        rows = -(-positions // every)
        one = rows * self.layer.groups * columns_of(self.layer) * max(x.element_size(), torch.float32.itemsize)
        size = max(1, PATCH_BYTES // max(1, one))
        for start in range(0, len(x), size):
            yield slice(start, min(start + size, len(x)))

    def _thinned(self, patches: Tensor, first: int, every: int) -> Tensor:
        """Return the chosen rows, [G, rows, K].

        Args:
            first: number of the first of these samples among all.
            every: a row is taken at every so many positions.
        """
        count, *positions = patches.shape[: -self.layer.weight.dim()]
        if every > 1:
            sample = torch.arange(first, first + count, device=patches.device)
            position = torch.arange(math.prod(positions), device=patches.device)
            chosen = (sample[:, None] + position) % every == 0
            patches = patches[chosen.view(count, *positions)]
        return patches.reshape(-1, self.layer.groups, columns_of(self.layer)).transpose(0, 1)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The means of x and of x̂, each [G, K]."""
        return self._sums[0] / max(1, self.rows), self._sums[1] / max(1, self.rows)

    @property
    def inputs(self) -> Tensor:
        """H, [G, K, K]."""
        return self._inputs * (2 / max(1, self.used))

    @property
    def cross(self) -> Tensor | None:
        """D, [G, K, K], or None."""
        return None if self._cross is None else self._cross * (2 / max(1, self.used))
