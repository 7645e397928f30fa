"""Defects of the published Q-Diffusion code, one test each that fails on the published behaviour."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from qdiff import weight_forms
from qdiff.adaptive_rounding import LearnedRounding
from qdiff.calibration import fitting
from qdiff.calibration.fisher import output_gradients
from qdiff.calibration.reconstruction import RoundingRegulariser
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.walk import Walker, walk
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.config import QuantConfig
from qdiff.functional import fake_quantize_inference
from qdiff.interface import Step, SteppedNetwork, split_input
from qdiff.methods import linear, qdiffusion
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import RangeMethod, estimate
from qdiff.ranges.least_error import SHRINK_STEPS
from qdiff.ranges.qparams import qparams

W4A8 = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split_shortcut": True}
# Relative L2 of gradients: one backward pass at two batch sizes.
GRADIENT_TOLERANCE = 1e-4


def quick(**changes):
    return QDiffusionConfig(**{"iterations": 3, "act_iterations": 3, "batch_size": 5, "lr_rounding": 0.05, **changes})


def quiet():
    return CalibrationRun(show_progress=False)


def published_min_max(x, bits):
    """δ from max − min, z from min(·, 0): the published formula."""
    delta = (x.max() - x.min()) / (2**bits - 1)
    return delta, torch.round(-x.min().clamp(max=0) / delta)


def test_min_max_of_positive_values_keeps_them_apart():
    x = torch.tensor([5.0, 5.5, 6.0, 6.5, 7.0])
    y = fake_quantize_inference(x, *estimate(x, 8, RangeMethod.MIN_MAX, symmetric=False), 8)
    assert (y - x).abs().max() < 0.02  # half a step of 7/255
    assert len(fake_quantize_inference(x, *published_min_max(x, 8), 8).unique()) == 1, "the defect is not what it was"


def test_symmetric_search_finds_the_least_error():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) ** 3

    def error(delta, zero_point):
        return float((fake_quantize_inference(x, delta, zero_point, 4) - x).abs().pow(2.4).mean())

    candidates = [
        error(*qparams(x.min() * factor, x.max() * factor, 4, symmetric=True))
        for factor in (1 - 0.01 * step for step in range(SHRINK_STEPS))
    ]
    found = error(*estimate(x, 4, RangeMethod.MSE, symmetric=True))
    assert found == pytest.approx(min(candidates), rel=1e-5)  # float32 mean of 500 terms
    assert found < 0.95 * candidates[0], "the whole range is best already: the test is blind"


def test_the_second_slice_of_a_split_layer_is_regularised():
    torch.manual_seed(0)
    layer = QuantModule(split_input(nn.Conv2d(6, 4, 1), 2), QuantConfig(4, split_shortcut=True))
    layer.init_weight_ranges(RangeMethod.MIN_MAX)
    rounding = LearnedRounding(layer)
    RoundingRegulariser()([rounding], 0.9).backward()
    first, second = rounding.alpha.grad.split(layer.slices, dim=1)
    for part in (first, second):
        assert (part != 0).float().mean() > 0.5
    # And it is rounded by its own α: flipping them all changes its integers alone.
    rounding.harden()
    before = layer.weight_int.clone()
    with torch.no_grad():
        rounding.alpha[:, 2:] *= -1
    rounding.harden()
    assert torch.equal(layer.weight_int[:, :2], before[:, :2])
    assert not torch.equal(layer.weight_int[:, 2:], before[:, 2:])


@pytest.mark.slow
def test_dropout_is_off_during_reconstruction(tiny_network, data):
    results = []
    for probability in (0.9, 0.0):
        network, training = copy.deepcopy(tiny_network).train(), []
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability
                module.register_forward_hook(lambda m, *_: training.append(m.training))  # noqa: B023 - used at once
        qnn = QuantModel(network, QuantConfig(**W4A8))
        qdiffusion.calibrate(qnn, data, quick(), quiet())
        assert training and not any(training)
        results.append(qnn.state_dict())
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [{}, {"running_stat_softmax_only": True}])
def test_running_statistics_cover_attention_quantizers(wrap, data, monkeypatch, recipe):
    """Over three batches the average must have moved the ranges of q, k, v and the softmax output."""
    monkeypatch.setattr(CalibrationRun, "walker", lambda run, qnn, _: Walker(run.storage, qnn.device, batch_size=4))
    monkeypatch.setattr("qdiff.calibration.run.fit_unit", lambda *_: 0.0)
    deltas = []
    for running in (False, True):
        qnn = wrap(**W4A8)
        qdiffusion.calibrate(qnn, data, quick(range_samples=4, running_stat=running, **recipe), quiet())
        deltas.append({n: float(q.delta.detach()) for n, q in qnn.act_quantizers().items() if ".core." in n})
    operands = "w" if recipe else "qkvw"
    names = [n for n in deltas[0] if n[-1] in operands]
    assert names and all(deltas[0][n] != deltas[1][n] for n in names)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["block", "layer"])
def test_attention_without_parameters_does_not_break_weight_reconstruction(wrap, data, unit):
    """With activation quantizers there, the attention core is a unit that has nothing to round."""
    qnn = wrap(**W4A8)
    run = quiet()
    qdiffusion.calibrate(qnn, data, quick(unit=unit), run)
    cores = [n.removesuffix(".act_quantizer_w") for n in qnn.act_quantizers() if n.endswith("act_quantizer_w")]
    assert cores and not any(f"weights {core}" in run.errors for core in cores)
    if unit == "layer":
        assert all(f"activations {core}" in run.errors for core in cores)


class Backwards(SteppedNetwork):
    """Uses its layers in the opposite order of their registration."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c, self.b, self.a = nn.Linear(5, 2), nn.Linear(4, 5), nn.Linear(3, 4)

    def start(self, x):
        return {"x": x, "h": x}

    def steps(self):
        for name in "abc":
            yield Step(name, getattr(self, name), lambda s: (s["h"].sin(),), lambda s, out: s.__setitem__("h", out))


def test_fisher_follows_execution_order(relative):
    """At step b: a as quantized, b with rounded weights, c in float, whatever was registered first."""
    network = Backwards()
    reference = copy.deepcopy(network).requires_grad_(False)
    qnn = QuantModel(network, QuantConfig(weight_bits=2))
    for name, layer in qnn.layers().items():
        layer.init_weight_ranges(RangeMethod.MIN_MAX)
        if name in "ab":
            reference.get_submodule(name).weight.copy_(layer.dequantized_weight())
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    final = qnn(x)
    walker = Walker(ActivationStorage(), torch.device("cpu"))
    for index, step, _, state in walk(qnn.model, (x,), walker, weights=True, activations=False):
        if step.name == "b":
            gradients = output_gradients(qnn.model, index, state, final, walker)
    hidden = reference.b(reference.a(x.sin()).sin()).requires_grad_(True)

    def expected(last):
        return torch.autograd.grad((last(hidden.sin()) - final).square().sum(), hidden)[0]

    assert relative(gradients, expected(reference.c)) < GRADIENT_TOLERANCE
    reference.c.weight.copy_(qnn.model.c.dequantized_weight())
    assert relative(gradients, expected(reference.c)) > GRADIENT_TOLERANCE


@pytest.mark.parametrize("format", ["native", "published"])
def test_loading_takes_no_forward_pass(format, wrap, calibrated, tmp_path, monkeypatch):
    save_checkpoint(calibrated(**W4A8), tmp_path / "q", format=format)
    qnn = wrap(**W4A8)
    before = {k: (v.shape, v.dtype) for k, v in qnn.state_dict().items()}
    monkeypatch.setattr(QuantModule, "forward", lambda *_: pytest.fail("loading ran a forward pass"))
    load_checkpoint(qnn, tmp_path / "q")
    assert {k: (v.shape, v.dtype) for k, v in qnn.state_dict().items()} == before, "state appeared while loading"
    zero_points = [v for k, v in qnn.state_dict().items() if k.endswith("zero_point")]
    assert zero_points and all(z.dtype == torch.int32 for z in zero_points)
    qnn.assert_initialised()


@pytest.mark.slow
def test_symmetric_adaround_keeps_negative_weights(wrap, data, relative):
    """Clamped to unsigned levels with z = 0, every negative weight would become 0."""
    qnn = wrap(weight_bits=4, weight_symmetric=True)
    qdiffusion.calibrate(qnn, data, quick(), quiet())
    for layer in qnn.layers().values():
        (quantizer,) = layer.weight_quantizers
        weight = layer.dequantized_weight()
        assert (quantizer.zero_point == 8).all()
        assert (weight < 0).any() and weight.min() >= -8 * quantizer.delta.max()
        assert ((weight - layer.weight).abs() <= quantizer.delta * 1.001).all()
        assert relative(weight.clamp(min=0), layer.weight) > 0.5 > relative(weight, layer.weight)


@pytest.mark.slow
def test_the_last_partial_batch_is_used(wrap, data, monkeypatch):
    """12 samples in batches of 5, for observing (64 per batch there, so 70 samples) and for fitting."""
    rows_fitted = Counter()
    original = fitting.optimise

    def optimise(unit, optimiser, objective, *rest, **options):
        def counting(output, target, numbers):
            rows_fitted.update(numbers.tolist())
            return objective(output, target, None)

        unit.weights = torch.arange(len(unit.target))  # come to the objective with the samples that they belong to
        return original(unit, optimiser, counting, *rest, **options)

    monkeypatch.setattr(fitting, "optimise", optimise)
    qdiffusion.calibrate(wrap(weight_bits=4), data, quick(), quiet())  # 3 batches of 5 per unit
    assert set(rows_fitted) == set(range(12))

    x, t = (i.repeat(6, *[1] * (i.dim() - 1))[:70].clone() for i in data.inputs)
    x[69] *= 10
    qnn = wrap(weight_bits=4, act_bits=8, act_symmetric=True)
    linear.calibrate(qnn, CalibrationSet((x, t)), None, quiet())
    assert float(qnn.model.conv_in.act_quantizers[0].delta) == pytest.approx(float(x.abs().max()) / 127, rel=1e-6)


def test_the_memory_budget_decides_where_attention_goes(data, calibrated):
    """Not a hard-coded token count: any activation goes to disk once the budget is full, and none is thinned out."""
    qnn = calibrated(**W4A8)
    for budget, on_disk in ((None, False), (0, True)):
        storage = ActivationStorage(budget)
        for _, step, unit, _ in walk(qnn.model, data.inputs, Walker(storage, qnn.device), True, False):
            assert len(unit.target) == len(data)
            assert all(len(i) == len(data) for i in unit.inputs)
            if ".attn" in step.name:
                assert (storage.on_disk > 0) == on_disk and (storage.in_ram > 0) != on_disk


def test_weights_are_dequantized_once_not_every_step(calibrated, held_out, monkeypatch):
    qnn, calls = calibrated(weight_bits=4, split_shortcut=True), []
    dequantize = weight_forms.dequantize
    monkeypatch.setattr(weight_forms, "dequantize", lambda *a: calls.append(1) or dequantize(*a))
    with qnn.quantized(), torch.no_grad():
        for _ in range(3):
            qnn(*held_out)
    assert len(calls) == sum(len(layer.slices) for layer in qnn.layers().values())
