"""Moments of a layer's inputs in the float and in the quantized network, summed batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qdiff.calibration.feeding import to_device
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
    return _windows(layer, _padded(layer, x).contiguous(), layer.groups)


def input_rows(layer: QuantModule, x: Tensor, chosen: Callable[[torch.Size], Tensor] | None = None) -> Tensor:
    """Return rows of `input_patches` (im2col), with the columns in the order of memory.

    Group g of the output is rows[:, g] · weight[g-th C_out/G rows].flatten(1)[:, `column_order`]ᵀ.

    Args:
        layer, x: as in `input_patches`.
        chosen: given (N, *positions), returns which of them to take, bool of this shape in RAM; None takes all.

    Returns:
        [rows, G, K], sample after sample.
    """
    x = at_least_single(x)
    if layer.geometry is None:
        rows = x.reshape(len(x), -1, x.shape[-1])
        return _taken(rows, 2, chosen)[:, None]
    # All channels of a place are copied together; taken from the patches, it would be number by number.
    x = _padded(layer, x).movedim(1, -1).contiguous()
    places = torch.arange(x[..., 0].numel(), device=x.device).view(len(x), 1, *x.shape[1:-1])
    places = _windows(layer, places, 1).flatten(-layer.weight.dim())  # [N, *positions, kernel]
    places = _taken(places, places.dim() - 1, chosen)
    rows = x.flatten(0, -2).index_select(0, places.flatten())
    rows = rows.view(*places.shape, layer.groups, layer.weight.shape[1])
    return rows.transpose(1, 2).flatten(2)


def _taken(rows: Tensor, dims: int, chosen: Callable[[torch.Size], Tensor] | None) -> Tensor:
    """Return the chosen ones of rows whose places are the first so many dimensions; see `input_rows`."""
    where, rows = rows.shape[:dims], rows.flatten(0, dims - 1)
    if chosen is None:
        return rows
    # A mask as the index would make the host wait for a GPU, which counts what is set in it.
    return rows.index_select(0, to_device(chosen(where).flatten().nonzero()[:, 0], rows.device))


def column_order(layer: QuantModule) -> Tensor:
    """Return for every column of `input_rows` its column in the weight, [K]: channels vary fastest, not places."""
    channels = layer.weight.shape[1]
    return torch.arange(columns_of(layer), device=layer.weight.device).view(channels, -1).T.flatten()


def _padded(layer: QuantModule, x: Tensor) -> Tensor:
    return F.pad(x, _padding(layer.geometry.padding, tuple(layer.weight.shape[2:]), layer.geometry.dilation))


def _windows(layer: QuantModule, x: Tensor, groups: int) -> Tensor:
    """Return the part of a padded, contiguous input [N, C, …] under the kernel at every position, as a view.

    Returns:
        [N, *positions, groups, C/groups, *kernel].
    """
    where, kernel = layer.geometry, tuple(layer.weight.shape[2:])
    (count, channels, *sizes), (by_sample, by_channel, *by_position) = x.shape, x.stride()
    steps = list(zip(sizes, kernel, where.stride, where.dilation, by_position, strict=True))
    positions = [(size - dilation * (width - 1) - 1) // stride + 1 for size, width, stride, dilation, _ in steps]
    in_group = channels // groups
    return x.as_strided(
        (count, *positions, groups, in_group, *kernel),
        (
            by_sample,
            *(stride * by for _, _, stride, _, by in steps),
            by_channel * in_group,
            by_channel,
            *(dilation * by for _, _, _, dilation, by in steps),
        ),
    )


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
        self.rows += len(x) * positions
        for total, t in zip(self._sums, (x, quantized), strict=True):
            # Samples first, in the inputs' own precision: converting every patch to float64 takes far longer.
            patches = input_patches(self.layer, at_least_single(t).sum(0, keepdim=True).double())
            total += patches.flatten(0, -self.layer.weight.dim() - 1).sum(0).view_as(total)
        if self._inputs is None:
            return
        for part in self._parts(x, positions, every):
            thinned = _Thinned(first + part.start, every) if every > 1 else None
            self._add_products(*(input_rows(self.layer, t[part], thinned).transpose(0, 1) for t in (x, quantized)))

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

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The means of x and of x̂, each [G, K]."""
        return self._sums[0] / max(1, self.rows), self._sums[1] / max(1, self.rows)

    @property
    def inputs(self) -> Tensor:
        """H, [G, K, K]."""
        return self._in_order(self._inputs) * (2 / max(1, self.used))

    @property
    def cross(self) -> Tensor | None:
        """D, [G, K, K], or None."""
        return None if self._cross is None else self._in_order(self._cross) * (2 / max(1, self.used))

    def _in_order(self, moments: Tensor) -> Tensor:
        """Return moments of the columns of `input_rows` in the weight's order."""
        order = column_order(self.layer).argsort()
        return moments[:, order][:, :, order]


@dataclass(frozen=True)
class _Thinned:
    """Chooses one position of every so many, others in every sample; ``first`` is the number of the first sample."""

    first: int
    every: int

    def __call__(self, shape: torch.Size) -> Tensor:
        sample = torch.arange(self.first, self.first + shape[0])
        position = torch.arange(math.prod(shape[1:]))
        return ((sample[:, None] + position) % self.every == 0).view(shape)
