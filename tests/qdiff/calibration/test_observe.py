"""Observing a unit: memory, and so the number of samples per pass, decides no range, and averages see all timesteps."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from qdiff.calibration.observe import observe_unit
from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.sample_timesteps import prepare_timesteps
from qdiff.calibration.unit_inputs import UnitInputs
from qdiff.config import QuantConfig
from qdiff.interface import AttentionCore
from qdiff.quant_model import QuantModel
from qdiff.quantizer import calibrated_act_quantizers
from qdiff.ranges.estimators import ESTIMATORS
from qdiff.ranges.grid_search import GridSearch
from qdiff.ranges.least_error import LeastError

SAMPLES = 150  # two batches of 64 and a remainder
PASSES = (64, 20, 7)
RUNNING = 0.95


class TwoHeads(nn.Module):
    """A layer and attention, which takes two rows per sample."""

    def __init__(self):
        super().__init__()
        self.layer, self.core = nn.Linear(8, 8), AttentionCore()

    def forward(self, x, t):
        heads = self.layer(x).unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)
        return self.core(heads, heads, heads).unflatten(0, (len(x), 2)).flatten(1, 2)


@pytest.fixture
def observed(walker, monkeypatch):
    """``observed(method, pass_size, …)``: δ and z of all quantizers; samples get larger from first to last."""
    monkeypatch.setattr(GridSearch, "BATCH_SAMPLE", 1 << 8)
    monkeypatch.setattr(LeastError, "SAMPLE", 1 << 11)
    torch.manual_seed(0)
    network = TwoHeads().double()
    x = (
        torch.randn(SAMPLES, 5, 8, dtype=torch.float64)
        * torch.linspace(0.2, 3, SAMPLES, dtype=torch.float64)[:, None, None]
    )
    t = torch.arange(SAMPLES) // 70  # entries of 70, 70 and 10 samples

    def made(method, pass_size, ranges="shared", rows=None, momentum=None, in_turn=False):
        qnn = QuantModel(copy.deepcopy(network), QuantConfig(8, 8, act_ranges=ranges), example=None).double()
        timesteps = prepare_timesteps(qnn, (x, t), torch.device("cpu"))
        small = replace(walker, pass_size=pass_size, timesteps=timesteps)
        for layer in qnn.layers().values():
            layer.init_weight_ranges("max")
        with torch.no_grad():
            unit = Unit("unit", qnn.model, (x, t), qnn.model(x, t), (x, t))
        quantizers = calibrated_act_quantizers(qnn)
        if in_turn:
            taken = UnitInputs(unit, small, activations=True, act_range=method)
            for _, leaf in taken.leaves:
                taken.observe(leaf)
        else:
            observe_unit(unit, small, method, rows, momentum)
        return {name: (q.delta.tolist(), q.zero_point.tolist()) for name, q in quantizers.items()}

    return made


@pytest.mark.parametrize("ranges", ["shared", "timestep"])
@pytest.mark.parametrize("method", ESTIMATORS)
@pytest.mark.parametrize("in_turn", [False, True])
def test_passes_decide_no_range(observed, method, ranges, in_turn):
    whole, *parts = [observed(method, size, ranges, in_turn=in_turn) for size in PASSES]
    assert all(part == whole for part in parts)
    assert len({str(ends) for ends in whole.values()}) == 3  # of the layer, of q, k and v, of the softmax


@pytest.mark.parametrize("method", ["max", "mse"])
def test_passes_decide_no_running_average(observed, method):
    rows = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    whole, *parts = [observed(method, size, rows=rows, momentum=RUNNING) for size in PASSES]
    assert all(part == whole for part in parts)
    assert whole != observed(method, 64, rows=rows)


@pytest.mark.parametrize("method", [name for name, kind in ESTIMATORS.items() if kind.averages])
@pytest.mark.parametrize("in_turn", [False, True])
def test_averages_see_all_timesteps(observed, method, in_turn):
    """In the order in which samples are stored, the small ones at the beginning would count most."""
    (stored, _), (shuffled, _) = (
        observed(method, 64, rows=rows, in_turn=turn)["model.layer.act_quantizers.0"]
        for rows, turn in ((torch.arange(SAMPLES), False), (None, in_turn))
    )
    assert shuffled > 1.2 * stored
