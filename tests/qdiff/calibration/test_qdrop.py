"""QDrop: which elements stay in float while a unit is fitted, when, and that nothing of it is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qdiff.calibration.feeding import Feeding
from qdiff.calibration.objectives import lp_error
from qdiff.calibration.qdrop import Dropping
from qdiff.calibration.reconstruction import FitSettings, Unit, optimise
from qdiff.config import QuantConfig
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import ActQuantizer

CPU = torch.device("cpu")
COUNT = 40_000
# Of a share of so many coin throws: five standard deviations.
SHARE_TOLERANCE = 5 * 0.5 / COUNT**0.5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixed(probability, seed=0, count=COUNT):
    """A mix of zeros (quantized) and ones (float)."""
    dropping = Dropping(nn.Identity(), probability, generator(seed), CPU)
    return dropping.feed((torch.zeros(4, count // 4),), (torch.ones(4, count // 4),))[0]


class QuantizedTwice(nn.Module):
    """Two quantizers of one step size."""

    def __init__(self, learned=True):
        super().__init__()
        self.first, self.second = ActQuantizer(8), ActQuantizer(8)
        for quantizer in (self.first, self.second):
            quantizer.set(torch.tensor(1.0), torch.tensor(0))
            quantizer.delta.requires_grad_(learned)

    def forward(self, x):
        return self.first(x), self.second(x)


HALF = torch.full((COUNT,), 0.25)  # quantized it is 0


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_each_element_is_float_with_the_probability(probability):
    made = mixed(probability)
    assert set(made.unique().tolist()) == {0.0, 1.0}
    assert abs(float(made.mean()) - probability) < SHARE_TOLERANCE
    assert abs(float(made.mean()) - probability - 0.05) > SHARE_TOLERANCE  # planted
    # Element by element: neither whole samples nor whole positions.
    assert all(0 < float(row.mean()) < 1 for row in made) and len({tuple(row.tolist()) for row in made}) == 4
    neighbours = (made[:, 1:] == made[:, :-1]).float().mean()
    assert abs(float(neighbours) - (probability**2 + (1 - probability) ** 2)) < 2 * SHARE_TOLERANCE


def test_the_generator_decides():
    first = mixed(0.5, seed=3)
    torch.manual_seed(99)
    assert torch.equal(mixed(0.5, seed=3), first)
    assert not torch.equal(mixed(0.5, seed=4), first)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    mixed(0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_pass_and_every_place_has_masks_of_its_own():
    module = QuantizedTwice()
    zeros, ones = torch.zeros(COUNT), torch.ones(COUNT)
    with Dropping(module, 0.5, generator(), CPU) as dropping:
        masks = []
        for _ in range(2):
            masks += dropping.feed((zeros, zeros), (ones, ones))
            masks += [m.detach() * 4 for m in module(HALF)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(float((one == other).float().mean()) - 0.5) < SHARE_TOLERANCE


def test_timesteps_pass():
    t, other = torch.arange(50), torch.arange(50) + 1000
    dropping = Dropping(nn.Identity(), 0.5, generator(), CPU)
    x, same = dropping.feed((torch.zeros(50), t), (torch.ones(50), other))
    assert torch.equal(same, t) and 0 < float(x.mean()) < 1


@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_quantizers_pass_float_only_while_gradients_flow(probability):
    module = QuantizedTwice()
    with Dropping(module, probability, generator(), CPU):
        for out in module(HALF):
            assert set(out.unique().tolist()) == {0.0, 0.25}
            assert abs(float((out == 0.25).float().mean()) - probability) < SHARE_TOLERANCE
        with torch.no_grad():
            assert all(not out.any() for out in module(HALF))
        # Nothing in front of a quantizer with a fixed range at a unit's entry is learned, but the weight behind it is.
        fixed = QuantizedTwice(learned=False)
        with Dropping(fixed, probability, generator(), CPU):
            assert all(out.any() and not out.all() for out in fixed(HALF))
            assert all(out.any() for out in fixed(HALF.clone().requires_grad_()))
    assert all(not out.any() for out in module(HALF)), "dropped outside of fitting"


def test_nothing_is_left_behind_on_an_exception():
    module = QuantizedTwice()
    with pytest.raises(KeyboardInterrupt), Dropping(module, 0.5, generator(), CPU):
        assert module.first.dropping is not None
        raise KeyboardInterrupt
    assert module.first.dropping is None and module.second.dropping is None


def test_what_stays_in_float_has_the_gradient_of_float():
    """The gradient of x is 1 either way (straight through); that of δ comes from quantized elements alone."""
    module = QuantizedTwice()
    x = HALF.clone().requires_grad_()
    with Dropping(module, 0.5, generator(), CPU):
        out, _ = module(x)
        out.sum().backward()
    kept = out == 0
    assert torch.equal(x.grad, torch.ones(COUNT))
    expected = float(kept.sum()) * -0.25  # (y − x)/δ of each
    assert float(module.first.delta.grad) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(-0.25 * COUNT, rel=1e-6)


def test_gradient_checkpointing_meets_the_same_masks():
    """It runs a block a second time on the way back; with other masks the gradients are of another loss."""
    gradients = []
    for recompute in (False, True, True):
        module, x = QuantizedTwice(), torch.linspace(0, 200, COUNT).requires_grad_()

        def product(x, module=module):
            return module.first(x) * module.second(x)

        with Dropping(module, 0.5, generator(), CPU) as dropping:
            dropping.feed((), ())
            out = checkpoint(product, x, use_reentrant=False) if recompute else product(x)
            if len(gradients) == 2:  # planted: a pass of its own for the second run
                dropping.passes += 1
            out.sum().backward()
        gradients.append((x.grad, float(module.first.delta.grad)))
    assert torch.equal(gradients[0][0], gradients[1][0]) and gradients[0][1] == gradients[1][1]
    assert not torch.equal(gradients[0][0], gradients[2][0])


# --- In the optimisation loop


class Spy(nn.Module):
    """Keeps what it is fed; one parameter."""

    def __init__(self):
        super().__init__()
        self.shift, self.fed = nn.Parameter(torch.zeros(())), []

    def forward(self, x, t):
        self.fed.append((x.detach().clone(), t))
        return x + self.shift


def loop(module, drop, inputs, float_inputs, pass_size=None, seed=0):
    unit = Unit("spy", module, inputs, torch.zeros(len(inputs[0]), 500), float_inputs)
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.0)
    settings = FitSettings(3, 4, drop=drop)
    optimise(unit, optimiser, lp_error(2.0), settings, generator(seed), Feeding(CPU, pass_size))


@pytest.mark.parametrize("pass_size", [None, 3])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_the_loop_mixes_the_inputs(drop, pass_size):
    module = Spy()
    rows = torch.arange(6.0)[:, None].expand(6, 500)
    loop(module, drop, (rows, torch.arange(6)), (rows + 10, torch.arange(6) + 100), pass_size)
    assert len(module.fed) == 3 * (1 if pass_size is None else 2)
    masks = []
    for x, t in module.fed:
        assert (t < 100).all()
        mask = (x - t[:, None]) / 10  # row and timestep have the same number
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        masks.append(mask)
    share = float(torch.cat(masks).mean())
    assert share == 0 if drop == 0 else 0.45 < share < 0.55
    if drop > 0:
        assert not torch.equal(masks[0][:1], masks[-1][:1])


def test_the_loop_drops_in_quantizers_and_stops_with_the_interruption():
    torch.manual_seed(0)
    layer = QuantModule(nn.Linear(500, 500), QuantConfig(None, 4)).requires_grad_(False)
    layer.act_quantizers[0].set(torch.tensor(0.3), torch.tensor(8))
    layer.act_quantizers[0].delta.requires_grad_(True)
    x = torch.randn(6, 500)
    seen = []

    def interrupted(module, args):
        seen.append(module.act_quantizers[0].dropping)
        if len(seen) == 2:
            raise KeyboardInterrupt

    layer.register_forward_pre_hook(interrupted)
    with leaf_modes([layer], weights=False, activations=True), pytest.raises(KeyboardInterrupt):
        loop(layer, 0.5, (x,), (x,))
    assert len(seen) == 2 and seen[0] is not None and layer.act_quantizers[0].dropping is None
    seen.clear()
    with leaf_modes([layer], weights=False, activations=True), pytest.raises(KeyboardInterrupt):
        loop(layer, 0.0, (x,), (x,))
    assert seen == [None, None]
