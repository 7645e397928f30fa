"""The naive baseline: nearest rounding, extremes of what really passes, nothing learned."""

from __future__ import annotations

import pytest
import torch

from qdiff.calibration.run import CalibrationRun, assert_all_fired
from qdiff.calibration.samples import CalibrationSet
from qdiff.methods import linear
from qdiff.ranges.qparams import qparams

# Relative, of a step size: activations at another batch size differ in the last bits.
RANGE_TOLERANCE = 1e-4


def test_weights_are_rounded_to_nearest(calibrated):
    for layer in calibrated(weight_bits=4).layers().values():
        (quantizer,) = layer.weight_quantizers
        levels = (torch.round(layer.weight / quantizer.delta) + quantizer.zero_point).clamp(0, 15)
        assert torch.equal(layer.weight_int.float(), levels)


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_are_the_extremes_of_the_quantized_networks_inputs(calibrated, data, symmetric):
    """Observed by hooks on the finished network: what each layer gets is what its range was taken from."""
    qnn = calibrated(weight_bits=4, act_bits=8, act_symmetric=symmetric)
    seen = {}
    for name, layer in qnn.layers().items():
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
    with qnn.quantized(), torch.no_grad():
        qnn(*data.inputs)
    first_in_its_block = ["temb.dense.0", "temb.dense.1", "conv_in", "down.0.block.0.conv1", "mid.attn_1.q", "conv_out"]
    for name in first_in_its_block:  # later ones see activations that are quantized by now and were not when observed
        delta, _ = qparams(seen[name].amin(), seen[name].amax(), 8, symmetric)
        got = float(qnn.layers()[name].act_quantizers[0].delta)
        assert got == pytest.approx(float(delta), rel=RANGE_TOLERANCE), name
        assert got * 1.01 != pytest.approx(float(delta), rel=RANGE_TOLERANCE), name


def test_every_quantizer_is_set_and_fires(calibrated):
    qnn = calibrated(weight_bits=4, act_bits=8, split_shortcut=True)
    assert all(q.initialised for q in qnn.act_quantizers().values())
    assert qnn.silent_quantizers() == []
    assert any(n.endswith("core.act_quantizer_w") for n in qnn.act_quantizers())


@pytest.mark.parametrize("config", [{"weight_bits": None, "act_bits": 8}, {"weight_bits": 4, "act_bits": None}])
def test_one_side_alone(calibrated, held_out, run_quantized, relative, config):
    qnn = calibrated(**config)
    assert 0 < relative(run_quantized(qnn, held_out), qnn(*held_out)) < 0.5


@pytest.mark.slow
def test_more_bits_are_closer_to_float(calibrated, held_out, run_quantized, relative):
    errors = []
    for bits in (3, 4, 6, 8):
        qnn = calibrated(weight_bits=bits, act_bits=8)
        errors.append(relative(run_quantized(qnn, held_out), qnn(*held_out)))
    assert errors == sorted(errors, reverse=True)


def test_more_samples_than_a_batch_all_count(wrap, data):
    """The 65th sample has the largest value: a range from one batch of 64 would miss it."""
    x, t = (i.repeat(6, *[1] * (i.dim() - 1))[:65] for i in data.inputs)
    x = x.clone()
    x[64] *= 10
    qnn = wrap(weight_bits=4, act_bits=8, act_symmetric=True)
    linear.calibrate(qnn, CalibrationSet((x, t)), None, CalibrationRun(show_progress=False))
    expected = float(x.abs().max()) / 127
    assert float(qnn.model.conv_in.act_quantizers[0].delta) == pytest.approx(expected, rel=RANGE_TOLERANCE)


def test_a_quantizer_that_never_fires_is_found(calibrated, data):
    qnn = calibrated(weight_bits=4, act_bits=8)
    qnn.model.mid.attn_1.core.forward = lambda q, k, v: v
    with pytest.raises(RuntimeError, match=r"4 activation quantizers never fired, e\.g\. mid\.attn_1"):
        assert_all_fired(qnn, data)


def test_an_output_that_is_not_finite_is_found(calibrated, data):
    qnn = calibrated(weight_bits=4, act_bits=8)
    with torch.no_grad():
        qnn.model.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        assert_all_fired(qnn, data)
