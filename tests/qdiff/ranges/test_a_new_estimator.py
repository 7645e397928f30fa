"""A range estimator of one's own is a class and a row: config, command line, calibration and checkpoints know it."""

from __future__ import annotations

import pytest
import torch

from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.cli.options.parser import Parser, add_quantization_options
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.methods import linear
from qdiff.ranges.estimators import ESTIMATORS
from qdiff.ranges.qparams import qparams
from qdiff.ranges.range_estimator import RangeEstimator

INNER = [0.05, 0.95]


class MiddleNinety(RangeEstimator):
    """The docstring's example: the twentieths at both ends are clipped."""

    @classmethod
    def choose(cls, rows, low, high, bits, symmetric, unsigned):
        low, high = torch.quantile(rows, torch.tensor(INNER), dim=1)
        return qparams(low, high, bits, symmetric, unsigned)


@pytest.fixture
def middle(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "middle", MiddleNinety)
    return "middle"


def asked_for(*words):
    parser = Parser(None)
    add_quantization_options(parser)
    return parser.parse_args(["--ptq", *words])


def calibrated(wrap, held_out, **config):
    qnn = wrap(**config)
    linear.calibrate(qnn, CalibrationSet(held_out), None, CalibrationRun(show_progress=False))
    return qnn


@pytest.mark.slow
def test_it_quantizes_a_network(middle, wrap, held_out, tmp_path):
    config = {"weight_bits": 4, "act_bits": 8, "weight_range": middle, "act_range": middle}
    qnn = calibrated(wrap, held_out, **config)

    layer = qnn.layers()["conv_in"]
    low, high = torch.quantile(layer.weight.flatten(1), torch.tensor(INNER), dim=1)
    assert torch.equal(layer.weight_quantizers[0].delta.flatten(), qparams(low, high, 4, False)[0])
    values = held_out[0].flatten()
    values = torch.cat([values, values.min()[None], values.max()[None]])
    low, high = torch.quantile(values, torch.tensor(INNER))
    assert float(layer.act_quantizers[0].delta) == pytest.approx(float(qparams(low, high, 8, False)[0]), rel=1e-6)
    # Planted: that is what no other row gives.
    other = calibrated(wrap, held_out, **{**config, "weight_range": "max", "act_range": "max"}).layers()["conv_in"]
    assert not torch.equal(other.weight_quantizers[0].delta, layer.weight_quantizers[0].delta)
    assert not torch.equal(other.act_quantizers[0].delta, layer.act_quantizers[0].delta)

    save_checkpoint(qnn, tmp_path / "q")
    load_checkpoint(again := wrap(**config), tmp_path / "q")
    with torch.no_grad(), qnn.quantized(), again.quantized():
        assert torch.equal(qnn(*held_out), again(*held_out))


def test_config_and_options_know_it(middle):
    config = QuantConfig(weight_range=middle, act_range=middle)
    assert QuantConfig.from_dict(config.to_dict()) == config
    args = asked_for("--w_range", middle, "--a_range", middle)
    assert args.w_range == args.a_range == middle


def test_without_its_row_it_is_an_error():
    with pytest.raises(UserError, match="weight_range is middle; give it one of max, mse, search"):
        QuantConfig(weight_range="middle")
    with pytest.raises(UserError, match="argument --a_range: invalid choice: 'middle'"):
        asked_for("--a_range", "middle")
    assert asked_for("--w_range", "search").w_range == "search"
