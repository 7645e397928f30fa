"""What rounding a layer's weight adds to a result, from the gradients of that result by the weight.

A weight that is rounded column by column (`qdiff.calibration.column_rounding`) has the error E·L: E has independent
entries, with the variance of rounding to nearest, and L = diag(U)⁻¹·U for the factor U of H⁻¹ = UᵀU, the columns in the
order in which they are rounded. So the variance of ⟨G, E·L⟩ is Σ_r σ_r²·|G_r·Lᵀ|², for a gradient G with rows G_r.
Rounding to nearest, L = I, would be another ranking: most of its error lies where the inputs are strongest, and that is
what columns rounded later make up for. The bias absorbs the mean of the error, so G is taken of the inputs less their
mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qdiff.calibration.column_rounding import Factor, Grid, NotPositiveDefinite, ordered_factors, round_columns
from qdiff.calibration.feeding import to_device
from qdiff.calibration.input_moments import column_order, columns_of, input_patches, input_rows
from qdiff.calibration.probed_sensitivity import by_sample, until_backward
from qdiff.calibration.sensitivity import Operand, config_of_one, quick_range, sqnr
from qdiff.config import QuantConfig
from qdiff.functional import dequantize, quantize
from qdiff.quant_layer import QuantModule
from qdiff.ranges.estimators import RangeMethod, estimate
from qdiff.ranges.first_token import FirstToken

ROWS = 2048  # of a layer's input, for H
SEARCHED_ROWS = 16  # of a weight
CLIPPED_INPUTS = 256  # rows of an input on which errors of those rows are compared
# Up to this width a weight may have to make up for more than its grid reaches, so that errors are 1.2 to 16 times those
# of E·L at 2 bits, and 0.9 to 2.2 times at 3 (bundled models).
CLIPPED_BITS = 3


class WeightNoise:
    """The noise of one layer's weight at several widths, beside float forward and backward passes.

    Args:
        layer: the float layer.
        name: its name, for its config.
        config: how ranges are chosen.
        widths: in bits.
        first_token: of the layer (`qdiff.calibration.first_token`); this token meets the float weight.
        generator: chooses the rows of the input that are kept, on the CPU.
    """

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        config: QuantConfig,
        widths: Sequence[int],
        first_token: FirstToken | None,
        generator: torch.Generator,
    ) -> None:
        self.layer, self.config, self.generator = layer, config, generator
        self.variances: dict[int, Tensor] = {}  # of rounding to nearest, by output row
        for bits in widths:
            own = config_of_one(config, name, Operand.WEIGHTS, bits)
            self.shape = QuantModule(layer, own).to(layer.weight.device).eval()
            self.shape.first_token = first_token
            self.variances[bits] = _rounding_variances(self.shape, config, bits)
        self._kept: list[Tensor] = []  # rows of the input [n, G, K]; columns as in `input_rows`, here and below
        self._samples = self._copies = 1
        self._gradient: Tensor | None = None  # [samples, C_out, K]
        self._bias_gradient: Tensor | None = None  # [samples, C_out]
        self._noises: dict[int, Tensor | float] = dict.fromkeys(widths, 0.0)
        self._called = False
        self._factors: list[Tensor] = []  # Lᵀ of each group, in the order of the rows' columns

    @torch.no_grad()
    def keep(self, x: Tensor, rows: int) -> None:
        """Keep some rows of an input, drawn with replacement."""
        patches = input_patches(self.shape, self.shape.quantized_part(x.detach()))
        where = patches.shape[: -self.shape.weight.dim()]
        chosen = torch.stack([torch.randint(size, (rows,), generator=self.generator) for size in where])
        kept = patches[tuple(to_device(chosen, x.device))].reshape(rows, self.shape.groups, columns_of(self.shape))
        self._kept.append(kept[..., column_order(self.shape)])

    def start(self, samples: int, copies: int) -> None:
        """Begin a batch; gradients of all calls until `finish` add up. Arguments as in `RoundedLayer.start`."""
        self._samples, self._copies = samples, copies
        self._gradient = self._bias_gradient = None

    def on_output(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """Have the backward pass add up this call's gradient by the weight."""
        self._called = True
        if not torch.is_grad_enabled():  # a checkpointed part, which is called again in the backward pass
            return None
        out = out.view_as(out) if out.requires_grad else out.detach().requires_grad_()
        values = until_backward(args[0])
        out.register_hook(lambda gradient: self._add(values(), gradient))
        return out

    @torch.no_grad()
    def _add(self, x: Tensor, gradient: Tensor) -> None:
        part, groups = self.shape.quantized_part(x), self.shape.groups
        rows = input_rows(self.shape, part).unflatten(0, (len(x), -1))  # [N, P, G, K]
        if self.shape.geometry is None:
            gradient = self.shape.quantized_part(gradient).reshape(len(x), -1, gradient.shape[-1])
        else:
            gradient = gradient.flatten(2).mT
        by_group = gradient.to(rows.dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1)  # [N, G, C_out/G, P]
        product = (by_group @ rows.transpose(1, 2)).flatten(1, 2)
        made = by_sample(product, self._samples, self._copies), by_sample(gradient.sum(1), self._samples, self._copies)
        if self._gradient is None:
            self._gradient, self._bias_gradient = made
        elif self._gradient.shape == made[0].shape:
            self._gradient += made[0]
            self._bias_gradient += made[1]
        else:  # calls of different kinds: one projection of all
            self._gradient = self._gradient.sum(0, keepdim=True) + made[0].sum(0, keepdim=True)
            self._bias_gradient = self._bias_gradient.sum(0, keepdim=True) + made[1].sum(0, keepdim=True)

    @torch.no_grad()
    def finish(self, scale: float | Tensor = 1.0) -> None:
        """End a batch; its noise counts ``scale`` times."""
        if self._gradient is None:
            return
        rows = torch.cat(self._kept)
        if not self._factors:
            made = _input_factors(rows)
            self._factors = [factor.transposed for factor in made]
            for bits in [b for b in self.variances if b <= CLIPPED_BITS]:
                self.variances[bits] = self.variances[bits] * self._clipping(bits, rows, made)
        gradient = self._gradient
        if self.shape.bias is not None:
            means = rows.mean(0).repeat_interleave(gradient.shape[1] // self.shape.groups, dim=0)  # [C_out, K]
            gradient = gradient - self._bias_gradient[..., None] * means
        parts = zip(gradient.chunk(self.shape.groups, dim=1), self._factors, strict=True)
        strength = torch.cat([(part @ factor).double().square().sum(dim=(0, 2)) for part, factor in parts])
        for bits, variance in self.variances.items():
            self._noises[bits] = self._noises[bits] + scale * (strength * variance).sum()
        self._gradient = self._bias_gradient = None

    def _clipping(self, bits: int, inputs: Tensor, factors: Sequence[_InputFactor]) -> Tensor:
        """Return by how much errors at a width exceed those of E·L, shape (): some rows are rounded column by column.

        Args:
            inputs: rows of the layer's input [n, G, K].
            factors: of its groups.
        """
        weight = self.shape.weight_to_quantize().flatten(1)[:, column_order(self.shape)]
        variance = self.variances[bits]
        method, symmetric = quick_range(self.config.weight_range, bits), self.config.weight_symmetric
        inputs = inputs[:: max(1, len(inputs) // CLIPPED_INPUTS)]  # of all calls
        inputs = inputs - inputs.mean(0) if self.shape.bias is not None else inputs
        chosen = torch.arange(0, len(weight), max(1, len(weight) // SEARCHED_ROWS))
        groups = chosen * self.shape.groups // len(weight)
        found = expected = 0.0  # sums on the device, which the host does not read
        for group in groups.unique().tolist():
            rows, x, made = to_device(chosen[groups == group], weight.device), inputs[:, group], factors[group]
            grid = estimate(weight[rows], bits, method, symmetric, per_channel=True)
            error = made.rounding_error(weight[rows], *(t.reshape(-1, 1) for t in grid), bits)
            found = found + (x @ error.mT).double().square().sum()
            expected = expected + variance[rows].sum() * (x @ made.transposed).double().square().sum()
        ratio = found / expected
        return torch.where((expected > 0) & (ratio > 1.0), ratio, 1.0)

    def quality(self, signal: float) -> dict[int, float] | None:
        """Return the ratio of the signal to the noise in dB, by width; None if the layer was never called."""
        return {bits: sqnr(signal, float(noise)) for bits, noise in self._noises.items()} if self._called else None


def _rounding_variances(layer: QuantModule, config: QuantConfig, bits: int) -> Tensor:
    """Return the mean squared error of rounding each row of a weight to nearest, float64 [C_out].

    Ranges are the extremes; what a search for a better range gains is measured on a few rows.
    """
    layer.init_weight_ranges(RangeMethod.MIN_MAX)
    weight = layer.float_weight().flatten(1)
    variances = (layer.dequantized_weight().flatten(1) - weight).double().square().mean(1)
    method = quick_range(config.weight_range, bits)
    if method == RangeMethod.MIN_MAX:
        return variances
    some = weight[:: max(1, len(weight) // SEARCHED_ROWS)]
    errors = []
    for kind in (method, RangeMethod.MIN_MAX):
        delta, zero_point = estimate(some, bits, kind, config.weight_symmetric, per_channel=True)
        rounded = dequantize(quantize(some, delta, zero_point, bits), delta, zero_point)
        errors.append((rounded - some).double().square().sum())
    return variances * torch.where(errors[1] > 0, errors[0] / errors[1], errors[1] + 1.0).clamp(max=1.0)


def _input_factors(rows: Tensor) -> list[_InputFactor]:
    """Return the factors of every group of a layer from rows of its input [n, G, K]."""
    moments = [(part.mT @ part).double() / len(rows) for part in rows.unbind(1)]
    try:
        made = ordered_factors(moments)
    except NotPositiveDefinite:
        made = [_factor_or_identity(one) for one in moments]
    return [_InputFactor(*factor, rows.dtype) for factor in made]


def _factor_or_identity(moments: Tensor) -> Factor:
    try:
        return ordered_factors([moments])[0]
    except NotPositiveDefinite:
        columns, device = len(moments), moments.device
        return torch.arange(columns, device=device), torch.eye(columns, dtype=moments.dtype, device=device)


class _InputFactor:
    """The factors of the second moments of a layer's, or of one group's input, for columns in the order of rounding.

    Args:
        order: of the columns [K].
        upper: U [K, K], float64.
        dtype: of the inputs.

    Attributes:
        transposed: Lᵀ [K, K]; its rows are in the order of the inputs' columns.
    """

    def __init__(self, order: Tensor, upper: Tensor, dtype: torch.dtype) -> None:
        self.order, self.upper = order, upper
        self.transposed = (upper / upper.diagonal()[:, None]).mT[order.argsort()].to(dtype)

    def rounding_error(self, weight: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        """Return what rounding column by column changes in rows of a weight [R, K], on the grid δ, z [R, 1]."""
        ordered = weight.double()[:, self.order]
        grid = Grid(delta.expand_as(weight), zero_point.expand_as(weight), bits)
        rounded = dequantize(round_columns(ordered, grid, self.upper, None), delta.double(), zero_point.double())
        return (rounded - ordered)[:, self.order.argsort()].to(weight.dtype)
