"""Every method on a plain module: what it finds for the same network written as a sequence of steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from traced_networks import Repeating, SkipNetwork, SteppedSkipNetwork, inputs, made

from qdiff.api import calibrate
from qdiff.calibration.fitting import UnitKind
from qdiff.calibration.footprint import measure_footprint
from qdiff.calibration.input_scales import InputScaling, Scaling
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.walk import walk
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.methods.dmq import DmqConfig
from qdiff.methods.eda_dm import EdaDmConfig
from qdiff.methods.gptq import GptqConfig
from qdiff.methods.grip import GripConfig
from qdiff.methods.modiff import ChangesConfig, calibrate_changes
from qdiff.methods.ptq4dm import Ptq4dmConfig
from qdiff.methods.qdiffusion import QDiffusionConfig, WeightObjective
from qdiff.methods.registry import METHODS
from qdiff.methods.tfmq_dm import TfmqDmConfig
from qdiff.quant_model import QuantModel
from qdiff.tracing.replay import OUTPUT

QUICK = {"iterations": 3, "batch_size": 4}
SETTINGS = {
    "linear": [None],
    "qdiff": [
        QDiffusionConfig(**QUICK, act_iterations=3, lr_rounding=0.5),
        QDiffusionConfig(**QUICK, act_iterations=3, lr_rounding=0.5, objective=WeightObjective.FISHER),
        QDiffusionConfig(**QUICK, act_iterations=3, lr_rounding=0.5, unit=UnitKind.LAYER, running_stat=True),
    ],
    "ptq4dm": [Ptq4dmConfig(**QUICK)],
    "eda-dm": [EdaDmConfig(**QUICK, layer_weight=0.5), EdaDmConfig(**QUICK, unit=UnitKind.LAYER)],
    "gptq": [GptqConfig(), GptqConfig(target="gptaq", bias_correction=False)],
    "grip": [GripConfig()],
    "dmq": [DmqConfig(**QUICK, act_iterations=3, lr_rounding=0.5)],
    "tfmq-dm": [TfmqDmConfig(**QUICK, lr_rounding=0.5, temporal_unit=False)],
}
# Learned scales take thousands of iterations per layer by default.
SCALING = {"dmq": InputScaling(Scaling.LEARNED, iterations=3, batch_size=4)}
CASES = [(method, settings) for method in METHODS for settings in SETTINGS[method]]
DATA = CalibrationSet(inputs(8))


def wrapped(kind, **config):
    """Return a network with the same float weights, traced where it is a plain module."""
    network = made(kind)
    network.load_state_dict(made(SkipNetwork).state_dict())
    return QuantModel(network, QuantConfig(**{"weight_bits": 4, "act_bits": 8, **config}), DATA.inputs).double()


def quiet():
    return CalibrationRun(seed=3, show_progress=False)


def state_of(qnn):
    return {name: tensor.clone() for name, tensor in qnn.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_method_finds_the_same(method, settings):
    traced, stepped = wrapped(SkipNetwork), wrapped(SteppedSkipNetwork)
    before = state_of(traced)
    scaling = SCALING.get(method)
    errors = [calibrate(qnn, DATA, method, settings, run=quiet(), scaling=scaling) for qnn in (traced, stepped)]
    found, expected = state_of(traced), state_of(stepped)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert errors[0] == errors[1]
    assert any(not torch.equal(before[name], tensor) for name, tensor in found.items() if name.endswith("weight_int"))


def test_learned_roundings_are_not_the_nearest_ones():
    """So that equal integers say something of the units."""
    nearest, learned = wrapped(SkipNetwork), wrapped(SkipNetwork)
    calibrate(nearest, DATA, "linear", run=quiet())
    calibrate(learned, DATA, "qdiff", SETTINGS["qdiff"][0], run=quiet())
    moved = [not torch.equal(a.weight_int, b.weight_int) for a, b in _pairs(nearest, learned)]
    assert sum(moved) >= len(moved) / 2


def _pairs(one, other):
    return zip(one.layers().values(), other.layers().values(), strict=True)


def test_ranges_of_changes():
    """MoDiff calibrates on pairs of samples."""
    pairs = CalibrationSet(tuple(i.unflatten(0, (-1, 2)) for i in DATA.inputs))
    states = []
    for kind in (SkipNetwork, SteppedSkipNetwork):
        qnn = wrapped(kind, modulate=True, rest_bits=8)
        calibrate(qnn, DATA, "linear", run=quiet())
        calibrate_changes(qnn, pairs, ChangesConfig(**QUICK), quiet())
        states.append(state_of(qnn))
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())


def test_memory_per_sample_is_known():
    """Of the state, which holds inputs of its own; the leaves of a unit are the same."""
    traced, stepped = wrapped(SkipNetwork), wrapped(SteppedSkipNetwork)
    sample = tuple(i[:1] for i in DATA.inputs)
    found = measure_footprint(traced.as_steps(sample), sample)
    assert found.inside == {**measure_footprint(stepped.model, sample).inside, OUTPUT: found.inside[OUTPUT]}
    assert found.stored > 0


def test_batches_do_not_matter():
    """A walk in batches of three finds the ranges of a walk in one batch."""

    class InThrees(CalibrationRun):
        def walker(self, qnn, inputs):
            return replace(super().walker(qnn, inputs), batch_size=3)

    whole, parts = wrapped(SkipNetwork), wrapped(SkipNetwork)
    calibrate(whole, DATA, "linear", run=quiet())
    calibrate(parts, DATA, "linear", run=InThrees(seed=3, show_progress=False))
    for name, tensor in state_of(whole).items():
        assert torch.allclose(tensor.double(), state_of(parts)[name].double(), rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_repeated_parts_run_as_they_were_fitted(method):
    """What is computed with them, between units, is what the quantized network computes."""

    qnn, taken = QuantModel(made(Repeating), QuantConfig(4, 8), DATA.inputs).double(), []
    calibrate(qnn, DATA, method, SETTINGS[method][0], run=quiet(), scaling=SCALING.get(method))
    qnn.model.last.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with qnn.quantized():
        qnn(*DATA.inputs)
    walker = quiet().walker(qnn, DATA.inputs)
    steps = walk(qnn.as_steps(DATA.inputs), DATA.inputs, walker, weights=True, activations=True)
    units = {unit.name: unit.inputs[0] for _, _, unit, _ in steps}
    assert list(units) == ["blocks.0", "blocks.1", "last"]
    assert torch.allclose(units["last"], taken[0], rtol=1e-9, atol=1e-12)


def test_a_layer_that_is_called_twice_has_no_calibrated_changes():
    with pytest.raises(UserError, match=r"blocks\.0\.first is called several times per forward; give dynamic ranges"):
        QuantModel(made(Repeating), QuantConfig(4, 8, modulate=True), DATA.inputs)


@torch.no_grad()
def test_a_layer_that_is_called_twice_is_modulated_from_call_to_call():
    """Its quantization error at 16 bits is as small as that of any other layer, at every step of a trajectory."""
    config = QuantConfig(8, 16, modulate=True, act_dynamic=True)
    qnn = QuantModel(made(Repeating), config, DATA.inputs).double()
    calibrate(qnn, DATA, "linear", run=quiet())
    x, t = (i[:4] for i in DATA.inputs)
    with qnn.quantized(weights=True, activations=False):
        expected = [qnn(x * scale, t) for scale in (1.0, 1.1, 0.7)]
    with qnn.quantized(), qnn.trajectory():
        found = [qnn(x * scale, t) for scale in (1.0, 1.1, 0.7)]
    for right, made_here in zip(expected, found, strict=True):
        assert (right - made_here).norm() < 1e-3 * right.norm()


def test_a_layer_that_takes_several_shapes_cannot_be_modulated():
    class Shapes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, t):
            return self.last(self.layer(x) + self.layer(x.unsqueeze(1)).squeeze(1))

    config = QuantConfig(4, 8, modulate=True, act_dynamic=True)
    with pytest.raises(UserError, match="layer is called with inputs of several shapes per forward; leave out"):
        QuantModel(made(Shapes), config, (torch.zeros(2, 4).double(), torch.zeros(2)))


def test_a_layer_that_is_called_twice_has_one_range_for_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, t):
            return self.last(self.layer(3 * self.layer(x)))

    network = made(Twice)
    with torch.no_grad():
        inner = 3 * network.layer(DATA.inputs[0])
    qnn = QuantModel(network, QuantConfig(8, 8), DATA.inputs)
    calibrate(qnn, DATA, "linear", run=quiet())
    seen = torch.cat([DATA.inputs[0].flatten(), inner.flatten()])
    quantizer = network.layer.act_quantizers[0]
    low, high = -quantizer.zero_point * quantizer.delta, (255 - quantizer.zero_point) * quantizer.delta
    assert low <= seen.min() + quantizer.delta and high >= seen.max() - quantizer.delta
    assert high - low < 1.05 * (seen.max() - seen.min())
    for settings in (
        QDiffusionConfig(**QUICK, act_iterations=2),
        QDiffusionConfig(**QUICK, act_iterations=2, unit="layer"),
    ):
        learned = QuantModel(made(Twice), QuantConfig(4, 8), DATA.inputs).double()
        calibrate(learned, DATA, "qdiff", settings, run=quiet())
