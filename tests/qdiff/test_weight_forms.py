"""The forms of a layer's weight: what each holds and computes with, which becomes which, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.kernels.packing import packed_bytes
from qdiff.ranges.estimators import RangeMethod
from qdiff.weight_forms import TRANSITIONS, WeightedModule, WeightForm

BITS = 3
F = WeightForm


def weighted(bits=BITS):
    torch.manual_seed(0)
    made = WeightedModule(nn.Parameter(torch.randn(4, 6, 3)), [2, 4], QuantConfig(weight_bits=bits))
    if bits is not None:
        made.init_weight_ranges(RangeMethod.MIN_MAX)
    return made.requires_grad_(False)


def doubled(module):
    """A weight that is nobody's: as if something had been learned."""
    weight = module.weight.detach().clone()
    return lambda: 2 * weight


WAYS = {
    F.FLOAT: lambda module: module.end_soft_rounding() or module.drop_dequantized(),
    F.SOFT: lambda module: module.begin_soft_rounding(doubled(module)),
    F.DEQUANTIZED: lambda module: module.hold_dequantized(),
    F.RELEASED: lambda module: module.release_float_weight(),
    F.PACKED: lambda module: module.pack(),
}
# Asked of a form where it changes nothing, and is no error: the network's modes and methods ask all layers alike.
STAYS = {
    *((form, F.FLOAT) for form in (F.RELEASED, F.PACKED)),
    *((form, F.DEQUANTIZED) for form in (F.SOFT, F.RELEASED, F.PACKED)),
    (F.PACKED, F.RELEASED),
}


def in_form(form):
    module = weighted()
    WAYS[form](module)
    assert module.form is form
    return module


def holds(module):
    """Which tensors there are: float values, integers of a byte each, dequantized ones beside, packed ones."""
    beside = module.weight_int is not None, module.weight_dequantized is not None, module.packed is not None
    return (not module.weight.is_meta, *beside)


HELD = {
    F.FLOAT: (True, True, False, False),
    F.SOFT: (True, True, False, False),
    F.DEQUANTIZED: (True, True, True, False),
    F.RELEASED: (True, True, False, False),
    F.PACKED: (False, False, False, True),
}


@pytest.mark.parametrize("before", F)
@pytest.mark.parametrize("after", F)
def test_every_way_is_taken_or_refused(before, after):
    module, fresh = in_form(before), weighted()
    if after is before or after in TRANSITIONS[before]:
        WAYS[after](module)
        assert module.form is after
    elif (before, after) in STAYS:
        WAYS[after](module)
        assert module.form is before
    else:
        with pytest.raises((RuntimeError, UserError), match=r"being learned|were released|is packed"):
            WAYS[after](module)
        assert module.form is before
    assert holds(module) == HELD[module.form]
    assert torch.equal(module.integers(), fresh.weight_int)
    expected = doubled(fresh)() if module.form is F.SOFT else fresh.dequantized_weight()
    assert torch.equal(module.quantized_weight(), expected)


@pytest.mark.parametrize("form", F)
def test_the_float_weight_is_there_or_an_error(form):
    module = in_form(form)
    for asked in (module.float_weight, module.weight_slices, lambda: module.init_weight_ranges(RangeMethod.MIN_MAX)):
        if form is F.RELEASED:
            with pytest.raises(RuntimeError, match="were released; load it again to calibrate"):
                asked()
        elif form is F.PACKED:
            with pytest.raises(UserError, match=r"is packed .*; load it again to calibrate"):
                asked()
        else:
            asked()
    if form not in (F.RELEASED, F.PACKED):
        assert torch.equal(module.float_weight(), weighted().weight)


@pytest.mark.parametrize("form", F)
def test_new_integers(form):
    """Nothing of the old ones may be computed with."""
    module, wanted = in_form(form), weighted()
    wanted.set_weight_int(wanted.weight_int.flip(0))
    if form is F.PACKED:
        with pytest.raises(UserError, match="is packed"):
            module.set_weight_int(module.integers().flip(0))
        return
    module.set_weight_int(module.weight_int.flip(0))
    assert module.form is (F.FLOAT if form is F.DEQUANTIZED else form)
    if form is not F.SOFT:
        assert torch.equal(module.quantized_weight(), wanted.dequantized_weight())
        assert not torch.equal(module.quantized_weight(), weighted().dequantized_weight())


@pytest.mark.parametrize("form", F)
def test_state_dicts(form):
    module, other = in_form(form), weighted()
    other.set_weight_int(other.weight_int.flip(0))
    if form is F.PACKED:
        other.pack()
        integers = module.integers()
    assert module.state_dict().keys() == other.state_dict().keys()
    if form is F.RELEASED:
        with pytest.raises(RuntimeError, match="build it again to load a state dict"):
            module.load_state_dict(other.state_dict())
        return
    module.load_state_dict(other.state_dict())
    module.end_soft_rounding()
    assert torch.equal(module.quantized_weight(), other.dequantized_weight())
    assert form is not F.PACKED or not torch.equal(module.integers(), integers)


def test_a_packed_state_dict_holds_the_integers_at_their_width():
    state = in_form(F.PACKED).state_dict()
    assert "weight" not in state and "weight_int" not in state
    assert state["packed.stream"].numel() == packed_bytes(weighted().weight.numel(), BITS)
    with pytest.raises(UserError, match="build it again to load a state dict that is not packed"):
        in_form(F.PACKED).load_state_dict(weighted().state_dict())


@pytest.mark.parametrize("form", F)
def test_copies_and_conversions_keep_the_form(form):
    module = copy.deepcopy(in_form(form))
    assert module.form is form and holds(module) == HELD[form]
    assert module.double().form is form and holds(module) == HELD[form]
    assert module.weight.dtype == torch.float64
    if form is not F.SOFT:
        assert module.quantized_weight().dtype == torch.float64


def test_a_stream_of_a_file_is_packed_as_it_is():
    module, source = weighted(), weighted()
    source.set_weight_int(source.weight_int.flip(0))
    stream = source.packed_integers()
    assert stream.numel() == packed_bytes(source.weight.numel(), BITS)
    module.pack(stream)
    assert module.packed_integers() is stream
    assert torch.equal(module.integers(), source.weight_int)


def test_without_a_width_a_weight_stays_in_float():
    module = weighted(None)
    module.release_float_weight()
    module.drop_dequantized()
    assert module.form is F.FLOAT and set(module.state_dict()) == {"weight"}
    for way in (F.SOFT, F.DEQUANTIZED, F.PACKED):
        with pytest.raises(RuntimeError, match="without a width cannot become"):
            WAYS[way](module)
    assert module.float_weight() is module.weight
