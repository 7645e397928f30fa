"""Rounding in closed form on the virtual GPU: more columns, groups, batches or calls make the host wait no more often.

Activations are stored on the GPU, as they are where they fit; those that do not are copied batch by batch, and the host
waits for these copies. The virtual device counts what PyTorch's operations wait for. It cannot see waits inside CUDA's
libraries (MAGMA factors a matrix partly on the host) or for page-locked memory, whose first allocation may wait.
"""

from __future__ import annotations

import pytest
import torch
from small_network import Small
from torch import nn

from qdiff.api import calibrate
from qdiff.calibration import column_rounding, input_moments
from qdiff.calibration.bias_correction import correct_bias
from qdiff.calibration.input_moments import InputMoments
from qdiff.calibration.layer_rounding import ColumnRounding, round_layer
from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.sample_timesteps import SampleTimesteps
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.unit_inputs import UnitInputs
from qdiff.calibration.walk import Walker
from qdiff.calibration.weight_noise import WeightNoise
from qdiff.config import QuantConfig
from qdiff.interface import split_input
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.ranges.calibrated_timesteps import CalibratedTimesteps

GPU = torch.device("cuda", 0)
OF_A_LAYER = 2  # whether its inputs are finite, and whether they have a factor
OF_A_BIAS = 1  # whether it changes
LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (6, 5, 6)),
    "two blocks": (lambda: nn.Linear(column_rounding.BLOCK + 6, 2), (6, 5, column_rounding.BLOCK + 6)),
    "conv": (lambda: nn.Conv2d(4, 4, 3, padding=1), (6, 4, 4, 4)),
    "groups": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (6, 4, 4, 4)),
    "more groups": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (6, 4, 4, 4)),
    "split": (lambda: split_input(nn.Conv2d(4, 4, 3), 1), (6, 4, 4, 4)),
}


def made(kind):
    """Return a quantized layer on the GPU, and inputs of it in both networks."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = QuantModule(make().to(GPU), QuantConfig(4, split_shortcut=True)).to(GPU).requires_grad_(False)
    layer.init_weight_ranges("max")
    x = torch.randn(shape)
    return layer, x.to(GPU), (0.9 * x + 0.2 * torch.randn(shape)).to(GPU)


def moments_of(kind, batch=3, settings=None):
    layer, x, quantized = made(kind)
    moments = InputMoments(layer, len(x), **(settings or ColumnRounding()).moments)
    for start in range(0, len(x), batch):
        moments.add(x[start : start + batch], quantized[start : start + batch], start)
    return layer, moments


def reads():
    torch.zeros((), device=GPU).item()


def reading(function):
    """Plant a number that the host reads wherever a function is called."""

    def also_reads(*given, **named):
        reads()
        return function(*given, **named)

    return also_reads


# --- Second moments


@pytest.mark.parametrize("kind", ["linear", "conv", "groups"])
@pytest.mark.parametrize("most_rows", [None, 11])
def test_moments_never_wait(kind, most_rows, cuda, monkeypatch):
    monkeypatch.setattr(input_moments, "PATCH_BYTES", 1)  # each sample is a part
    given = kind, 3, ColumnRounding(most_rows=most_rows)
    with cuda.counting() as counts:
        _, moments = moments_of(*given)
    assert counts.waits_inside("qdiff/calibration/input_moments.py") == [] and moments.used > 0
    monkeypatch.setattr(InputMoments, "_add_products", reading(InputMoments._add_products))
    with cuda.counting() as counts:
        moments_of(*given)
    assert len(counts.waits_inside("qdiff/calibration/input_moments.py")) == 6


def test_a_mask_as_the_index_would_be_counted(cuda, monkeypatch):
    """As it was: the mask is copied, and what is set in it is counted."""

    def masked(rows, dims, chosen):
        return rows[chosen(rows.shape[:dims])]

    monkeypatch.setattr(input_moments, "_taken", masked)
    with cuda.counting() as counts:
        moments_of("conv", 3, ColumnRounding(most_rows=11))
    assert len(counts.waits_inside("qdiff/calibration/input_moments.py")) == 8  # two batches of x and of x̂


# --- Rounding and biases


@pytest.mark.parametrize("target", ["corrected", "gptaq", "plain"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_waits_as_often_whatever_its_size(kind, target, cuda):
    settings = ColumnRounding(target=target)
    layer, moments = moments_of(kind, settings=settings)
    counts = cuda.counted(round_layer, kind, layer, moments, settings)
    assert len(counts.waits) == OF_A_LAYER, list(map(str, counts.waits))
    assert len(cuda.counted(correct_bias, layer, moments).waits) == OF_A_BIAS


@pytest.mark.parametrize("place", ["max_level", "_try_factor"], ids=["column", "group"])
def test_planted_a_number_read_in_the_loop(place, cuda, monkeypatch):
    monkeypatch.setattr(column_rounding, place, reading(getattr(column_rounding, place)))
    layer, moments = moments_of("more groups")
    counts = cuda.counted(round_layer, "layer", layer, moments, ColumnRounding())
    assert len(counts.waits) == OF_A_LAYER + (4 * 9 if place == "max_level" else 4)
    assert sum("(reads)" in str(wait) for wait in counts.waits) == len(counts.waits) - OF_A_LAYER


def test_where_there_is_no_factor_every_try_waits(cuda, monkeypatch):
    """The others of a layer's groups keep their factor."""
    layer, moments = moments_of("groups")
    tries, attempt = [], column_rounding._try_factor

    def fails_at_first(matrix, damping):
        upper, failed = attempt(matrix, damping)
        tries.append((damping.cpu(), upper))
        return upper, torch.ones_like(failed) if len(tries) == 1 else failed

    monkeypatch.setattr(column_rounding, "_try_factor", fails_at_first)
    expected = layer.weight_int.clone()
    counts = cuda.counted(round_layer, "layer", layer, moments, ColumnRounding())
    assert len(counts.waits_inside("qdiff/calibration/column_rounding.py:inverse_factors")) == 2 + len(tries)
    assert len(tries) == 4 and not torch.equal(layer.weight_int, expected)
    assert tries[2][0] == 10 * tries[0][0] and tries[3][0] == tries[1][0] and torch.equal(tries[3][1], tries[1][1])


# --- Units


def rounded_unit(batch, storage):
    """Do to the layers of a unit what GPTQ does."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3, padding=1)).to(GPU)
    qnn = QuantModel(network, QuantConfig(4, 8))
    for layer in qnn.layers().values():
        layer.init_weight_ranges("max")
    x = torch.randn(8, 2, 4, 4).to(storage.device)
    unit = Unit("unit", qnn.model, (0.9 * x,), x, (x,))
    inputs = UnitInputs(unit, Walker(storage, GPU, batch), True, "quick")
    for name, layer in inputs.layers:
        inputs.observe(layer)
        moments = inputs.moments(layer, most_rows=40)
        round_layer(name, layer, moments, ColumnRounding())
        correct_bias(layer, moments)
    return qnn


def waits_of_a_unit(cuda, batch, storage=None):
    storage = storage or ActivationStorage(device=GPU)
    return cuda.counted(rounded_unit, batch, storage).waits_inside("qdiff/calibration/")


def test_a_unit_waits_as_often_in_any_number_of_batches(cuda, monkeypatch):
    few, many = (waits_of_a_unit(cuda, batch) for batch in (4, 2))
    assert len(few) == len(many) == 2 * (OF_A_LAYER + OF_A_BIAS), many
    monkeypatch.setattr(UnitInputs, "_loaded", reading(UnitInputs._loaded))
    assert len(waits_of_a_unit(cuda, 2)) == len(many) + 2 * 3 * 4  # layers; ranges and both moments; batches


def test_activations_that_do_not_fit_add_their_copies_alone(cuda):
    found = waits_of_a_unit(cuda, 2, ActivationStorage())
    copies = [wait for wait in found if any(place in wait for place in ("(_loaded)", "(_stored)", "(load)"))]
    assert len(found) - len(copies) == 2 * (OF_A_LAYER + OF_A_BIAS) and all("copy at" in wait for wait in copies)


@pytest.mark.parametrize("entries", [2, 8])
def test_samples_are_grouped_by_timestep_at_one_wait(entries, cuda):
    shared = CalibratedTimesteps().to(GPU)
    shared.set(torch.arange(entries).float().to(GPU))
    of_samples = torch.arange(16) % entries
    timesteps, rows = SampleTimesteps(shared, of_samples.to(GPU)), torch.arange(16).flip(0)
    groups = []
    counts = cuda.counted(lambda: groups.extend(timesteps.groups(rows.to(GPU))))
    assert len(counts.waits) == 2  # the rows come from RAM here
    for entry, some in groups:
        assert torch.equal(some.cpu(), rows[of_samples[rows] == entry])


# --- Sensitivities; whole trajectories are in tests/scripts/backward_on_cuda.py


def waits_of_noise(cuda, kind, calls, batches):
    """What `trajectory_sensitivities` does to a layer's weight, without the passes through the network."""
    make, shape = LAYERS[kind]
    layer, x = make().to(GPU), torch.randn(shape).to(GPU)
    gradient = torch.randn(layer(x).shape).to(GPU)
    config = QuantConfig(4, None, weight_range="mse")
    noise = WeightNoise(layer, "layer", config, (3, 8), None, torch.Generator().manual_seed(0))
    with cuda.counting() as counts:
        for _ in range(batches * calls):
            noise.keep(x, 20)
        for _ in range(batches):
            noise.start(len(x), 1)
            for _ in range(calls):
                noise._add(x, gradient)
            noise.finish(torch.full((), 0.5, device=GPU))
    return list(map(str, counts.waits))


@pytest.mark.parametrize("kind", ["linear", "groups"])
def test_the_noise_of_a_weight_waits_for_its_factor_alone(kind, cuda):
    (wait,) = waits_of_noise(cuda, kind, 2, 2)
    assert "item at" in wait and "(inverse_factors)" in wait


def test_planted_a_number_read_at_every_call(cuda, monkeypatch):
    monkeypatch.setattr(WeightNoise, "_add", reading(WeightNoise._add))
    assert len(waits_of_noise(cuda, "linear", 2, 2)) == 1 + 4


# --- A network


@pytest.mark.slow
def test_a_calibration_waits_as_often_in_any_number_of_batches(cuda, data, monkeypatch):
    def waits(batch):
        torch.manual_seed(0)
        monkeypatch.setattr(Walker, "batch_size", batch)
        config = QuantConfig(4, 8, split_shortcut=True, weight_range="mse", act_range="quick")
        qnn = QuantModel(Small().eval().to(GPU), config, tuple(i[:2].to(GPU) for i in data.inputs))
        run = CalibrationRun(show_progress=False, storage=ActivationStorage(device=GPU))
        with cuda.counting() as counts:
            calibrate(qnn, data, "gptq", run=run)
        # Where the network itself makes a tensor of numbers, each of its calls waits.
        return [str(wait) for wait in counts.waits if "small_network" not in wait.stack[0].file]

    few, many = waits(6), waits(2)
    assert len(few) == len(many), set(many) - set(few)
    monkeypatch.setattr(UnitInputs, "_loaded", reading(UnitInputs._loaded))
    assert len(waits(2)) > len(many)
