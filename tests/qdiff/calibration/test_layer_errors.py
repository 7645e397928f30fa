"""The errors of a block's layers: against a computation by hand, in execution order, and without a trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qdiff.calibration.feeding import Feeding
from qdiff.calibration.layer_errors import LayerErrors
from qdiff.calibration.objectives import lp_error
from qdiff.calibration.reconstruction import FitSettings, Unit, optimise
from qdiff.config import QuantConfig
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.ranges.estimators import RangeMethod

# Relative: float32 sums of a few hundred terms in another order.
SUM_TOLERANCE = 1e-5
NAMES = ("enter", "middle", "leave")  # in execution order


def quantized(layer):
    module = QuantModule(layer, QuantConfig(3)).requires_grad_(False)
    module.init_weight_ranges(RangeMethod.MIN_MAX)
    return module


class Block(nn.Module):
    """Three convolutions, registered the other way round than they run, and a shortcut."""

    def __init__(self, recompute=False):
        super().__init__()
        torch.manual_seed(0)
        for name in reversed(NAMES):
            self.add_module(name, quantized(nn.Conv2d(4, 4, 3, padding=1)))
        self.recompute = recompute

    def compute(self, x):
        return x + self.leave(F.silu(self.middle(F.silu(self.enter(x)))))

    def forward(self, x):
        return checkpoint(self.compute, x, use_reentrant=False) if self.recompute else self.compute(x)


def images(seed, count=6):
    return torch.randn(count, 4, 5, 5, generator=torch.Generator().manual_seed(seed))


def outputs(block, x, in_float):
    """What each layer gives, computed by hand."""
    found, convolution = {}, {n: getattr(block, n) for n in NAMES}
    for name, layer in convolution.items():
        weight = layer.weight if in_float else layer.dequantized_weight()
        found[name] = x = F.conv2d(x, weight, layer.bias, padding=1)
        x = F.silu(x)
    return found


def by_hand(block, x, float_x, names=NAMES[:-1]):
    ours, wanted = outputs(block, x, False), outputs(block, float_x, True)
    positions = len(x) * 25
    return sum(float((ours[n] - wanted[n]).double().square().sum()) / positions for n in names)


def watched(block, x, float_x):
    errors = LayerErrors(block)
    with leaf_modes([block], weights=True, activations=False), errors.watch((float_x,)):
        block(x)
    return errors.error()


def hooks(module):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_all_layers_but_the_last_executed_one():
    block = Block()
    x, float_x = images(1), images(1) + 0.1 * images(2)
    got = float(watched(block, x, float_x))
    assert got == pytest.approx(by_hand(block, x, float_x), rel=SUM_TOLERANCE)
    # Planted: the last registered layer left out; all layers; the wrong input on the float side.
    for wrong in (
        by_hand(block, x, float_x, ("middle", "leave")),
        by_hand(block, x, float_x, NAMES),
        by_hand(block, x, x),
        by_hand(block, float_x, float_x),
    ):
        assert got != pytest.approx(wrong, rel=SUM_TOLERANCE)


def test_float_inputs_and_float_weights_give_no_error():
    block = Block()
    errors = LayerErrors(block)
    with leaf_modes([block], weights=False, activations=False), errors.watch((images(1),)):
        block(images(1))
    assert float(errors.error()) == 0


@pytest.mark.parametrize("module", [quantized(nn.Linear(4, 4)), nn.Identity()], ids=["one layer", "none"])
def test_a_block_of_one_layer_has_nothing_to_compare(module):
    assert watched(module, images(1)[..., :4], images(2)[..., :4]) == 0


def test_a_layer_that_runs_twice_counts_twice():
    block = Block()
    block.middle = block.enter
    got = float(watched(block, images(1), images(1)))
    ours, wanted = [], []
    for kind, found in ((False, ours), (True, wanted)):
        x = images(1)
        for _ in range(2):
            weight = block.enter.weight if kind else block.enter.dequantized_weight()
            x = F.conv2d(x, weight, block.enter.bias, padding=1)
            found.append(x)
            x = F.silu(x)
    parts = [float((a - b).square().sum()) / 150 for a, b in zip(ours, wanted, strict=True)]
    assert got == pytest.approx(sum(parts), rel=SUM_TOLERANCE) and got != pytest.approx(parts[0], rel=SUM_TOLERANCE)


@pytest.mark.parametrize("where", ["float pass", "block of code", "nowhere"])
def test_hooks_and_modes_are_as_before(where):
    block = Block()
    errors = LayerErrors(block)
    with leaf_modes([block], weights=True, activations=False):
        given = (images(1)[:, :3],) if where == "float pass" else (images(1),)  # too few channels
        try:
            with errors.watch(given):
                assert hooks(block) == 3
                if where == "block of code":
                    raise KeyboardInterrupt
        except (RuntimeError, KeyboardInterrupt):
            assert where != "nowhere"
        else:
            assert where == "nowhere"
        assert hooks(block) == 0
        assert all(getattr(block, n).weights_quantized for n in NAMES)
    assert not any(getattr(block, n).weights_quantized for n in NAMES)


def learned_gradient(block):
    """Of the layers' errors, with respect to a factor on the first layer's weight."""
    factor = torch.ones((), requires_grad=True)
    block.enter.begin_soft_rounding(lambda: block.enter.dequantized_weight() * factor)
    with leaf_modes([block], weights=True, activations=False):  # as in the loop, also on the way back
        error = watched(block, images(1), images(2))
        assert error.requires_grad
        error.backward()
    block.enter.end_soft_rounding()
    return float(factor.grad)


def test_the_gradient_is_that_of_the_quantized_side_and_survives_checkpointing():
    block = Block()
    gradient = learned_gradient(block)

    def shifted(by):
        delta = block.enter.weight_quantizers[0].delta
        before = delta.clone()
        delta *= 1 + by
        error = by_hand(block, images(1), images(2))
        delta.copy_(before)
        return error

    with torch.no_grad():
        expected = (shifted(1e-3) - shifted(-1e-3)) / 2e-3
    assert gradient == pytest.approx(expected, rel=1e-2)  # a difference quotient in float32
    assert learned_gradient(Block(recompute=True)) == pytest.approx(gradient, rel=SUM_TOLERANCE)


# --- In the optimisation loop


def first_loss(layer_weight, pass_size=None):
    """The loss of one iteration over all samples, nothing learned."""
    block = Block()
    x, float_x = images(1), images(2)
    with torch.no_grad():
        target = block(float_x)
    unknown = nn.Parameter(torch.zeros(()))
    block.enter.begin_soft_rounding(lambda: block.enter.dequantized_weight() + 0 * unknown)
    with leaf_modes([block], weights=True, activations=False):
        loss = optimise(
            Unit("block", block, (x,), target, (float_x,)),
            torch.optim.SGD([unknown], lr=0.0),
            lp_error(2.0),
            FitSettings(1, 6, layer_weight=layer_weight),
            torch.Generator(),
            Feeding(torch.device("cpu"), pass_size),
        )
    return loss, by_hand(block, x, float_x)


@pytest.mark.parametrize("pass_size", [None, 4])
def test_the_loss_has_the_layers_share(pass_size):
    plain, layers = first_loss(0.0, pass_size)
    for weight in (0.5, 3.0):
        with_layers, _ = first_loss(weight, pass_size)
        assert with_layers == pytest.approx(plain + weight * layers, rel=SUM_TOLERANCE)
        assert with_layers != pytest.approx(plain + 1.01 * weight * layers, rel=SUM_TOLERANCE)


def test_without_weight_no_float_pass_is_made(monkeypatch):
    monkeypatch.setattr(LayerErrors, "watch", lambda *_: pytest.fail("a float pass for nothing"))
    first_loss(0.0)
    with pytest.raises(pytest.fail.Exception):
        first_loss(0.5)
