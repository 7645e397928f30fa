"""DMQ: what its row of the registry sets, and that its ranges are observed and not learned."""

from __future__ import annotations

import pytest
import torch
from stopped_journal import ResumedJournal, StoppedJournal
from uneven_network import uneven_small

from qdiff import QuantModel
from qdiff.api import calibrate
from qdiff.calibration.input_scales import InputScaling, Scaling
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.config import ActRanges
from qdiff.methods.dmq import DmqConfig
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.methods.registry import METHODS

QUICK = {"iterations": 2, "batch_size": 4, "lr_rounding": 0.5}


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(5)
    return CalibrationSet((torch.randn(8, 1, 8, 8, generator=generator), torch.tensor([10, 990]).repeat(4)))


def steps(data, method, config, ranges):
    """δ of every activation after a calibration, by name."""
    quant = METHODS["dmq"].quant_config(weight_bits=4, act_bits=8, act_ranges=ranges)
    qnn = QuantModel(uneven_small(), quant, tuple(i[:2] for i in data.inputs))
    run = CalibrationRun(show_progress=False)
    calibrate(qnn, data, method, config, run=run, scaling=InputScaling(Scaling.SEARCH))
    assert all(error > 0 for name, error in run.errors.items() if name.startswith("activations "))
    return {n: q.delta.clone() for n, q in qnn.act_quantizers().items()}


def test_its_row():
    quant = METHODS["dmq"].quant_config(weight_bits=4, act_bits=8)
    assert quant.act_ranges is ActRanges.TIMESTEP and quant.power_of_two_scales
    assert not any(method.quant.get("power_of_two_scales") for name, method in METHODS.items() if name != "dmq")


@pytest.mark.slow
@pytest.mark.parametrize(("units", "phase"), [(2, "scaling"), (12, "weights"), (20, "activations")])
def test_a_calibration_continues(units, phase, data, tmp_path):
    quant = METHODS["dmq"].quant_config(weight_bits=4, act_bits=8)

    def made(journal=None):
        qnn = QuantModel(uneven_small(), quant, tuple(i[:2] for i in data.inputs))
        run = CalibrationRun(show_progress=False, journal=journal)
        scaling = InputScaling(Scaling.LEARNED, iterations=2)
        calibrate(qnn, data, "dmq", DmqConfig(**QUICK, act_iterations=2), run=run, scaling=scaling)
        return qnn

    whole, stopped = made(), StoppedJournal(tmp_path, lambda count, *_: count == units)
    with pytest.raises(KeyboardInterrupt):
        made(stopped)
    assert stopped.phase == phase
    resumed = made(journal := ResumedJournal(tmp_path))
    assert journal.restored == units
    for name, layer in whole.layers().items():
        assert torch.equal(layer.weight_int, resumed.layers()[name].weight_int)
    scales, again = (
        {n: m.input_scale for n, m in qnn.layers().items() if m.input_scale is not None} for qnn in (whole, resumed)
    )
    assert len(scales) > 5 and scales.keys() == again.keys()
    assert all(torch.equal(scales[name], again[name]) for name in scales)
    for name, quantizer in whole.act_quantizers().items():
        assert torch.equal(quantizer.delta, resumed.act_quantizers()[name].delta)


@pytest.mark.slow
def test_shared_ranges_are_not_learned(data):
    few, many = (
        steps(data, "dmq", DmqConfig(**QUICK, act_iterations=count, lr_act=0.01), "shared") for count in (1, 5)
    )
    assert len(few) > 12 and all(torch.equal(few[name], many[name]) for name in few)
    learned = steps(data, "qdiff", QDiffusionConfig(**QUICK, act_iterations=5, lr_act=0.01), "shared")
    assert any(not torch.equal(few[name], learned[name]) for name in few), "Q-Diffusion learns them"
