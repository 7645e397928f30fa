"""The forms that a layer holds its weight in, and the ways from one to another (docs/architecture.md lists all)."""

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
DEQUANTIZED_AT_A_TIME = 1 << 17  # weights: their three passes stay in a cache


class WeightForm(Enum):
    """What a layer holds of its weight."""

    FLOAT = "float"  # the float weight; where it has a width, the integers too, set once its quantizers are
    SOFT = "softly rounded"  # as FLOAT; a function of what is learned gives the weight to compute with
    DEQUANTIZED = "dequantized"  # as FLOAT, and δ·(q − z), so that a step of sampling costs what float costs
    RELEASED = "released"  # δ·(q − z) in the place of the float weight, and the integers
    PACKED = "packed"  # the integers at their width alone


TRANSITIONS: Mapping[WeightForm, tuple[WeightForm, ...]] = MappingProxyType(
    {
        WeightForm.FLOAT: (WeightForm.SOFT, WeightForm.DEQUANTIZED, WeightForm.RELEASED, WeightForm.PACKED),
        WeightForm.SOFT: (WeightForm.FLOAT,),
        WeightForm.DEQUANTIZED: (WeightForm.FLOAT, WeightForm.SOFT, WeightForm.RELEASED, WeightForm.PACKED),
        WeightForm.RELEASED: (WeightForm.PACKED,),
        WeightForm.PACKED: (),
    }
)
"""Which forms each form can become; whatever is not here is an error. To stay as it is, a form may always."""


class WeightedModule(nn.Module):
    """A module with one weight, which can be quantized.

    It is the base of a layer and not a part of it because state dicts and published files have these tensors under the
    layer's own name.

    Args:
        weight: the float weight [C_out, C_in, …]; taken over, not copied.
        slices: how many of the input channels share a quantizer; one number, or two where the layer is split.
        config: the weight's width, and whether its ranges are symmetric.

    State:
        weight: the float weight; RELEASED: δ·(q − z); PACKED: a shape without values.
        weight_int: uint8, weight's shape: the quantized weight, whatever rounding made it. PACKED: None. A weight
            without a width has none.
        weight_quantizers: one per slice; none where the weight has no width.

    Not in the state dict:
        weight_dequantized: DEQUANTIZED: δ·(q − z). Otherwise None.
        packed: PACKED: the integers. Otherwise None.
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
        """The form that the weight is in; the methods below change it."""
        return self._form

    def _assert_may_become(self, form: WeightForm) -> None:
        if len(self.weight_quantizers) == 0:
            raise RuntimeError(f"a weight without a width cannot become {form.value}; give QuantConfig weight_bits")
        if form is self._form or form in TRANSITIONS[self._form]:
            return
        if self._form is WeightForm.SOFT:
            raise RuntimeError(f"a weight whose rounding is being learned cannot become {form.value}; end that first")
        self._assert_not_packed()
        raise RuntimeError(f"{RELEASED}; load it anew to calibrate it or to run it in float")

    def _assert_not_packed(self) -> None:
        if self._form is WeightForm.PACKED:
            raise UserError(f"{PACKED}; load it anew to calibrate it or to run it in float")

    # What the weight is

    def float_weight(self) -> Tensor:
        """Return the float weight.

        Raises:
            UserError: it is PACKED.
            RuntimeError: it is RELEASED.
        """
        self._assert_not_packed()
        if self._form is WeightForm.RELEASED:
            raise RuntimeError(f"{RELEASED}; load it anew to calibrate it or to run it in float")
        return self.weight

    def weight_slices(self) -> Sequence[Tensor]:
        """Return views of the float weight, one per slice; errors as `float_weight`."""
        return self.float_weight().detach().split(self.slices, dim=1)

    def quantized_weight(self) -> Tensor:
        """Return the weight that a quantized layer computes with, in floating point; FLOAT becomes DEQUANTIZED."""
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
        """Return δ·(q − z), weight's shape and dtype, computed now."""
        integers = self.integers()
        weight = torch.empty(integers.shape, dtype=self.weight.dtype, device=integers.device)
        rows = max(1, DEQUANTIZED_AT_A_TIME // weight[0].numel())
        parts = zip(self.weight_quantizers, integers.split(self.slices, 1), weight.split(self.slices, 1), strict=True)
        for quantizer, part, out in parts:
            by_row = (t.split(rows) for t in (out, part, quantizer.delta, quantizer.zero_point))
            for some, *quantized in zip(*by_row, strict=True):
                some.copy_(dequantize(*quantized))
        return weight

    def integers(self) -> Tensor:
        """Return the quantized weight as whole numbers, uint8."""
        return self.weight_int if self.packed is None else self.packed.integers()

    def packed_integers(self) -> Tensor:
        """Return the quantized weight as integers at their width (`qdiff.kernels.packing`), uint8."""
        if self.packed is not None:
            return self.packed.stream
        return pack(self.weight_int, self.weight_quantizers[0].bits)

    # New integers, in the form that there is

    @torch.no_grad()
    def init_weight_ranges(self, method: str) -> None:
        """Choose δ and z per output channel and round every weight to the nearest level; errors as `float_weight`."""
        integers = []
        for quantizer, part in zip(self.weight_quantizers, self.weight_slices(), strict=True):
            quantizer.set(*estimate(part, quantizer.bits, method, quantizer.symmetric, per_channel=True))
            integers.append(quantize(part.float(), quantizer.delta, quantizer.zero_point, quantizer.bits))
        self.set_weight_int(torch.cat(integers, dim=1))

    @torch.no_grad()
    def set_weight_int(self, integers: Tensor) -> None:
        """Take over quantized weights; what was dequantized before is given up, or in a RELEASED weight replaced.

        Args:
            integers: whole numbers in range, of any dtype, in the weight's shape.

        Raises:
            UserError: the weight is PACKED.
        """
        self._assert_not_packed()
        self.weight_int.copy_(integers)
        self.drop_dequantized()
        if self._form is WeightForm.RELEASED:
            self.weight.copy_(self.dequantized_weight())

    # From form to form

    def hold_dequantized(self) -> None:
        """FLOAT becomes DEQUANTIZED; the other forms, which have another weight to compute with, stay."""
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
        """FLOAT or DEQUANTIZED becomes RELEASED, so that no second copy is held; the dequantized weight must be right.

        PACKED stays, and so does a weight without a width.

        Raises:
            RuntimeError: the weight is SOFT.
        """
        if len(self.weight_quantizers) == 0 or self._form in (WeightForm.RELEASED, WeightForm.PACKED):
            return
        self._assert_may_become(WeightForm.RELEASED)
        self.weight.copy_(self.dequantized_weight())
        self.weight_dequantized, self._form = None, WeightForm.RELEASED

    def pack(self, stream: Tensor | None = None) -> None:
        """Any form but SOFT becomes PACKED.

        Args:
            stream: the integers, where they come from a file; otherwise the layer's own.

        Raises:
            RuntimeError: the weight is SOFT.
        """
        if self._form is WeightForm.PACKED:
            return
        self._assert_may_become(WeightForm.PACKED)
        stream = self.packed_integers() if stream is None else stream
        self.packed = PackedWeight(stream, self.weight_quantizers[0].bits, self.weight.shape)
        self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)
        self.weight_int = self.weight_dequantized = None
        self._form = WeightForm.PACKED

    # State dicts and devices

    def assert_loads_state_dict(self) -> None:
        """Raise an error where a state dict cannot be loaded: the weight is RELEASED or PACKED."""
        if self._form is WeightForm.RELEASED:
            raise RuntimeError(f"{RELEASED}; build it anew to load a state dict")
        if self._form is WeightForm.PACKED:
            raise UserError(f"{PACKED} to overwrite; build it anew to load a state dict")

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.assert_loads_state_dict()
        self.drop_dequantized()  # it would be of the integers before
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        if self._form is WeightForm.PACKED:
            raise UserError(f"{PACKED} for a state dict; save the native format")
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable, recurse: bool = True) -> WeightedModule:
        """Move or convert the module; of a PACKED weight, `weight` (shape and dtype alone) stays on the meta device."""
        if self._form is not WeightForm.PACKED:
            return super()._apply(fn, recurse)
        shape, self.weight = self.weight, None
        try:
            return super()._apply(fn, recurse)
        finally:
            dtype = fn(torch.empty(0, dtype=shape.dtype)).dtype
            self.weight = nn.Parameter(torch.empty_like(shape, dtype=dtype, device="meta"), requires_grad=False)
