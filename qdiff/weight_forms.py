"""The forms in which a layer holds its weight, and the transitions between them (docs/architecture.md lists them)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from types import MappingProxyType

import torch
from torch import Tensor, nn

from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.functional import dequantize, quantize
from qdiff.kernels.packed_weight import PACKED, PackedWeight
from qdiff.kernels.packing import pack
from qdiff.quantizer import WeightQuantizer
from qdiff.ranges.estimators import estimate

RELEASED = "the float weights of this network were released"
DEQUANTIZED_AT_A_TIME = 1 << 17  # number of weights; small enough for the three passes over them to stay in the cache

RANGES_AT_A_TIME = 1 << 22  # number of weights; bounds the float copies of a large layer while it is rounded


class WeightForm(Enum):
    """The form in which a layer holds its weight."""

    FLOAT = "float"  # the float weight; if it has a width, also the integers, valid once its quantizers are set
    SOFT = "softly rounded"  # as FLOAT, but a function of the learned roundings returns the weight to compute with
    DEQUANTIZED = "dequantized"  # as FLOAT, plus δ·(q − z), so that a sampling step takes as long as in float
    RELEASED = "released"  # δ·(q − z) in place of the float weight, plus the integers
    PACKED = "packed"  # only the integers, packed at their width


TRANSITIONS: Mapping[WeightForm, tuple[WeightForm, ...]] = MappingProxyType(
    {
        WeightForm.FLOAT: (WeightForm.SOFT, WeightForm.DEQUANTIZED, WeightForm.RELEASED, WeightForm.PACKED),
        WeightForm.SOFT: (WeightForm.FLOAT,),
        WeightForm.DEQUANTIZED: (WeightForm.FLOAT, WeightForm.SOFT, WeightForm.RELEASED, WeightForm.PACKED),
        WeightForm.RELEASED: (WeightForm.PACKED,),
        WeightForm.PACKED: (),
    }
)
"""The forms that each form can become; other transitions are errors. Staying in the same form is always allowed."""


class WeightedModule(nn.Module):
    """A module with one weight, which can be quantized.

    It is the base class of a layer, not a submodule, because state dicts and published files store these tensors under
    the layer's own name.

    Args:
        weight: the float weight [C_out, C_in, …]; shared, not copied.
        slices: number of input channels per weight quantizer: one number, or two if the layer is split.
        config: the weight's width, and whether its ranges are symmetric.

    State:
        weight: the float weight; if RELEASED, δ·(q − z); if PACKED, only a shape and dtype: a meta tensor, no
            parameter.
        weight_int: the quantized weight, however it was rounded, as uint8 in the weight's shape; None if PACKED. A
            weight without a width does not have it.
        weight_quantizers: one per slice; empty if the weight has no width.

        packed: the integers if PACKED, else None; ``packed.stream`` in the state dict.

    Not in the state dict:
        weight_dequantized: δ·(q − z) if DEQUANTIZED, else None.
    """

    def __init__(self, weight: nn.Parameter, slices: list[int], config: QuantConfig) -> None:
        super().__init__()
        self.weight, self.slices = weight, slices
        self.weight_quantizers = nn.ModuleList()
        if config.weight_bits is not None:
            self.weight_quantizers.extend(
                WeightQuantizer(config.weight_bits, config.weight_symmetric, weight) for _ in slices
            )
            self.register_buffer("weight_int", torch.zeros_like(weight, dtype=torch.uint8))
        self.register_buffer("weight_dequantized", None, persistent=False)
        self.packed: PackedWeight | None = None
        self._soft_weight: Callable[[], Tensor] | None = None
        self._form = WeightForm.FLOAT

    @property
    def form(self) -> WeightForm:
        """Current form of the weight; the methods below change it."""
        return self._form

    def _assert_may_become(self, form: WeightForm) -> None:
        if len(self.weight_quantizers) == 0:
            raise RuntimeError(f"a weight without a width cannot become {form.value}; give QuantConfig weight_bits")
        if form is self._form or form in TRANSITIONS[self._form]:
            return
        if self._form is WeightForm.SOFT:
            raise RuntimeError(
                f"a weight whose rounding is being learned cannot become {form.value}; end the learning first"
            )
        self._assert_not_packed()
        raise RuntimeError(f"{RELEASED}; load it again to calibrate it or to run it in float")

    def _assert_not_packed(self) -> None:
        if self._form is WeightForm.PACKED:
            raise UserError(f"{PACKED}; load it again to calibrate it or to run it in float")

    # Reading the weight

    def float_weight(self) -> Tensor:
        """Return the float weight.

        Raises:
            UserError: it is PACKED.
            RuntimeError: it is RELEASED.
        """
        self._assert_not_packed()
        if self._form is WeightForm.RELEASED:
            raise RuntimeError(f"{RELEASED}; load it again to calibrate it or to run it in float")
        return self.weight

    def weight_to_quantize(self) -> Tensor:
        """Return the weight that the integers stand for: the float weight, unless the layer scales its input."""
        return self.float_weight()

    def weight_slices(self) -> Sequence[Tensor]:
        """Return `weight_to_quantize` in parts, one per slice; raises the same errors as `float_weight`."""
        return self.weight_to_quantize().detach().split(self.slices, dim=1)

    def quantized_weight(self) -> Tensor:
        """Return the weight that a quantized layer uses, in floating point; FLOAT becomes DEQUANTIZED."""
        if self._form is WeightForm.SOFT:
            return self._soft_weight()
        if self._form is WeightForm.RELEASED:
            return self.weight
        if self._form is WeightForm.PACKED:
            return self.packed.cached(self.dequantized_weight)
        self.hold_dequantized()
        return self.weight_dequantized

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """Compute and return δ·(q − z), with the weight's shape and dtype."""
        integers = self.integers()
        weight = torch.empty(integers.shape, dtype=self.weight.dtype, device=integers.device)
        rows = max(1, DEQUANTIZED_AT_A_TIME // weight[0].numel())
        parts = zip(self.weight_quantizers, integers.split(self.slices, 1), weight.split(self.slices, 1), strict=True)
        for quantizer, part, out in parts:
            by_row = (t.split(rows) for t in (out, part, quantizer.delta, quantizer.zero_point))
            for some, *quantized in zip(*by_row, strict=True):
                some.copy_(dequantize(*quantized))
        return weight

    def weight_grid(self) -> tuple[Tensor, Tensor]:
        """Return δ and z of the weights; they broadcast against the weight, and each slice has its own."""
        return self._over_slices([q.delta for q in self.weight_quantizers]), self._over_slices(
            [q.zero_point for q in self.weight_quantizers]
        )

    def _over_slices(self, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0].detach()
        shape = self.weight.shape
        expanded = (p.detach().expand(-1, n, *shape[2:]) for p, n in zip(parts, self.slices, strict=True))
        return torch.cat(list(expanded), dim=1)

    def integers(self) -> Tensor:
        """Return the quantized weight as integers, uint8."""
        return self.weight_int if self.packed is None else self.packed.integers()

    def packed_integers(self) -> Tensor:
        """Return the quantized weight as integers packed at their width (`qdiff.kernels.packing`), uint8."""
        if self.packed is not None:
            return self.packed.stream
        return pack(self.weight_int, self.weight_quantizers[0].bits)

    # Setting the integers, in the current form

    @torch.no_grad()
    def init_weight_ranges(self, method: str) -> None:
        """Choose δ and z per output channel and round all weights to nearest; raises the errors of `float_weight`."""
        rows = max(1, RANGES_AT_A_TIME // self.float_weight()[0].numel())
        integers = self.weight_int.split(self.slices, dim=1)
        for quantizer, part, out in zip(self.weight_quantizers, self.weight_slices(), integers, strict=True):
            ranges = []
            for some, levels in zip(part.split(rows), out.split(rows), strict=True):
                ranges.append(estimate(some, quantizer.bits, method, quantizer.symmetric, per_channel=True))
                levels.copy_(quantize(some.float(), *ranges[-1], quantizer.bits))
            quantizer.set(*(torch.cat(values) for values in zip(*ranges, strict=True)))
        self.drop_dequantized()

    @torch.no_grad()
    def set_weight_int(self, integers: Tensor) -> None:
        """Set the quantized weight. A dequantized copy is dropped; a RELEASED weight is replaced.

        Args:
            integers: levels within the width, of any dtype, in the weight's shape.

        Raises:
            UserError: the weight is PACKED.
        """
        self._assert_not_packed()
        self.weight_int.copy_(integers)
        self.drop_dequantized()
        if self._form is WeightForm.RELEASED:
            self.weight.copy_(self.dequantized_weight())

    # Changing the form

    def hold_dequantized(self) -> None:
        """FLOAT becomes DEQUANTIZED; the other forms already have a weight to compute with, and stay."""
        if self._form is WeightForm.FLOAT:
            self._assert_may_become(WeightForm.DEQUANTIZED)
            self.weight_dequantized, self._form = self.dequantized_weight(), WeightForm.DEQUANTIZED

    def drop_dequantized(self) -> None:
        """DEQUANTIZED becomes FLOAT; the other forms stay."""
        if self._form is WeightForm.DEQUANTIZED:
            self.weight_dequantized, self._form = None, WeightForm.FLOAT

    def begin_soft_rounding(self, soft_weight: Callable[[], Tensor]) -> None:
        """FLOAT or DEQUANTIZED becomes SOFT.

        Args:
            soft_weight: returns the weight to compute with.

        Raises:
            UserError: the weight is PACKED.
            RuntimeError: it is RELEASED.
        """
        self._assert_may_become(WeightForm.SOFT)
        self.weight_dequantized, self._soft_weight, self._form = None, soft_weight, WeightForm.SOFT

    def end_soft_rounding(self) -> None:
        """SOFT becomes FLOAT; the other forms stay."""
        if self._form is WeightForm.SOFT:
            self._soft_weight, self._form = None, WeightForm.FLOAT

    @torch.no_grad()
    def release_float_weight(self) -> None:
        """FLOAT or DEQUANTIZED becomes RELEASED, which holds no second copy; a dequantized weight must be up to date.

        A PACKED weight and a weight without a width stay as they are.

        Raises:
            RuntimeError: the weight is SOFT.
        """
        if len(self.weight_quantizers) == 0 or self._form in (WeightForm.RELEASED, WeightForm.PACKED):
            return
        self._assert_may_become(WeightForm.RELEASED)
        self.weight.copy_(self.dequantized_weight())
        self.weight_dequantized, self._form = None, WeightForm.RELEASED

    def pack(self, stream: Tensor | None = None) -> None:
        """Any form except SOFT becomes PACKED.

        Args:
            stream: packed integers from a file; None packs the layer's own.

        Raises:
            RuntimeError: the weight is SOFT.
        """
        if self._form is WeightForm.PACKED:
            return
        self._assert_may_become(WeightForm.PACKED)
        stream = self.packed_integers() if stream is None else stream
        self.packed = PackedWeight(stream, self.weight_quantizers[0].bits, self.weight.shape)
        self._keep_shape(self.weight)
        self.weight_int = self.weight_dequantized = None
        self._form = WeightForm.PACKED

    def _keep_shape(self, weight: Tensor) -> None:
        """Keep a weight's shape and dtype as a plain attribute: as a parameter it would say where the network is."""
        self._parameters.pop("weight", None)
        self.weight = torch.empty_like(weight, device="meta")

    # State dicts and devices

    def assert_loads_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Raise an error if a state dict cannot be loaded: the weight is RELEASED, or only one of the two is PACKED.

        Args:
            prefix: of this module's names in the state dict.
        """
        if self._form is WeightForm.RELEASED:
            raise RuntimeError(f"{RELEASED}; build it again to load a state dict")
        if self._form is WeightForm.PACKED and f"{prefix}weight_int" in state:
            raise UserError(f"{PACKED} to overwrite; build it again to load a state dict that is not packed")

    def _load_from_state_dict(self, state: Mapping[str, Tensor], prefix: str, *args, **kwargs) -> None:
        self.assert_loads_state_dict(state, prefix)
        self.drop_dequantized()  # it belongs to the old integers
        super()._load_from_state_dict(state, prefix, *args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True) -> WeightedModule:
        """Move or convert the module; `weight` of a PACKED module, only a shape and dtype, stays on the meta device."""
        super()._apply(fn, recurse)
        if self._form is WeightForm.PACKED:
            self._keep_shape(self.weight.to(fn(torch.empty(0, dtype=self.weight.dtype)).dtype))
        return self
