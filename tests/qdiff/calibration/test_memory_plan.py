"""What a calibration will take: counted from one sample, divided by a budget, refused where no disk could hold it."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch

from qdiff.calibration import memory_plan as memory
from qdiff.calibration.footprint import GRADIENT_COPIES, Footprint, measure_footprint
from qdiff.calibration.memory_plan import (
    DEFAULT_PASS,
    GPU_SHARE,
    SMALLEST_PASS,
    MemoryUse,
    plan_memory,
)
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.walk import Walker, walk
from qdiff.errors import UserError
from qdiff.methods import qdiffusion
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.quant_model import QuantModel

MIB = 1 << 20
# Relative: gradients of a batch that went through in parts differ in float32 summation order alone.
PARTS_TOLERANCE = 1e-4


def test_footprint_is_what_a_walk_really_stores(wrap, data):
    qnn = wrap(weight_bits=4)
    one = tuple(i[:1] for i in data.inputs)
    footprint = measure_footprint(qnn.model, one)
    storage = ActivationStorage()
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)
    for _ in walk(qnn.model, data.inputs, Walker(storage, torch.device("cpu")), weights=True, activations=False):
        pass
    stored = footprint.stored * len(data)
    assert 0.5 * stored < storage.peak <= stored
    assert set(footprint.inside) == {step.name for step in qnn.model.steps()}


def test_layer_inputs_are_those_of_the_largest_unit(wrap, data):
    """What `UnitInputs` stores: the float inputs of a unit's layers, and the quantized ones of one of them."""
    qnn, sample = wrap(weight_bits=4), tuple(i[:1] for i in data.inputs)
    footprint = measure_footprint(qnn.model, sample)
    taken = {}
    for name, layer in qnn.layers().items():
        layer.register_forward_pre_hook(lambda _, args, name=name: taken.update({name: args[0].numel() * 4}))
    with torch.no_grad():
        qnn.model(*sample)
    by_unit = [
        sum(size for name, size in taken.items() if name.startswith((f"{step.name}.", step.name)))
        for step in qnn.model.steps()
    ]
    assert footprint.layer_inputs == max(by_unit)
    assert footprint.with_layer_inputs.stored == footprint.stored + 2 * footprint.layer_inputs


def test_inside_counts_what_attention_multiplies(wrap, data):
    inside = measure_footprint(wrap(weight_bits=4).model, tuple(i[:1] for i in data.inputs)).inside
    twice = measure_footprint(wrap(weight_bits=4).model, tuple(torch.cat([i[:1]] * 2) for i in data.inputs)).inside
    assert all(twice[name] == 2 * size for name, size in inside.items())
    assert min(inside.values()) > 0


def test_batches_follow_from_a_pass():
    footprint = Footprint(stored=100, inside={"a": 10 * MIB, "b": 40 * MIB})
    assert footprint.forward_batch(400 * MIB, limit=64) == 10
    assert footprint.forward_batch(4000 * MIB, limit=64) == 64
    assert footprint.forward_batch(MIB, limit=64) == 1  # never none
    assert footprint.training_batch("a", 800 * MIB, limit=32) == 800 // (10 * GRADIENT_COPIES)
    assert footprint.training_batch("b", 800 * MIB, limit=32) == 800 // (40 * GRADIENT_COPIES)


def test_a_budget_is_divided_and_the_rest_goes_to_disk(wrap):
    qnn, footprint = wrap(weight_bits=4), Footprint(stored=10 * MIB, inside={"conv_in": MIB})
    plan = plan_memory(qnn, footprint, samples=100, batch_size=32, budget=600 * MIB)
    assert (plan.pass_bytes, plan.for_storage) == (300 * MIB, 300 * MIB)
    assert (plan.in_ram, plan.on_disk) == (300 * MIB, 700 * MIB)
    assert plan.in_pass == 32 * GRADIENT_COPIES * MIB
    assert plan.peak == plan.held + plan.unit + plan.in_pass + plan.in_ram
    roomy = plan_memory(qnn, footprint, samples=100, batch_size=32, budget=100 << 30)
    assert roomy.pass_bytes == DEFAULT_PASS and roomy.on_disk == 0 and roomy.in_ram == 1000 * MIB
    none = plan_memory(qnn, footprint, samples=100, batch_size=32, budget=0)
    assert (none.pass_bytes, none.for_storage, none.in_ram) == (SMALLEST_PASS, 0, 0)


def test_what_fits_on_no_disk_is_an_error(wrap, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 200 * MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    footprint = Footprint(stored=10 * MIB, inside={"conv_in": MIB})
    with pytest.raises(UserError, match=r"stores 0\.98 GiB.*--cali_n or --cali_st, raise --memory_budget"):
        plan_memory(wrap(weight_bits=4), footprint, samples=100, batch_size=32, budget=600 * MIB)
    plan_memory(wrap(weight_bits=4), footprint, samples=50, batch_size=32, budget=600 * MIB)


@pytest.fixture
def gpu(monkeypatch):
    """``gpu(free)``: the network is on a GPU with so many bytes free and 7 MiB in use; 4,000 MiB of RAM are free."""

    def planned_with(free: int) -> torch.device:
        device = torch.device("cuda", 0)
        monkeypatch.setattr(QuantModel, "device", property(lambda self: device))
        monkeypatch.setattr(memory, "available_on", lambda asked: free)
        monkeypatch.setattr(memory, "available_memory", lambda: 4000 * MIB)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda asked: 7 * MIB)
        return device

    return planned_with


def test_a_gpu_holds_all_stored_activations_or_none(wrap, gpu):
    qnn, footprint = wrap(weight_bits=4), Footprint(stored=10 * MIB, inside={"conv_in": MIB})
    device = gpu(4000 * MIB)
    roomy = plan_memory(qnn, footprint, samples=100, batch_size=32, budget=None)
    assert (roomy.gpu, roomy.on_gpu, roomy.in_ram, roomy.on_disk) == (device, 1000 * MIB, 0, 0)
    assert roomy.gpu_peak == 7 * MIB + roomy.unit + roomy.in_pass + roomy.on_gpu < 4000 * MIB
    assert roomy.peak == roomy.held  # RAM
    gpu(1000 * MIB)
    tight = plan_memory(qnn, footprint, samples=100, batch_size=32, budget=None)
    assert (tight.on_gpu, tight.in_ram) == (0, 1000 * MIB)
    # What the unit in work may take is what is left beside it.
    assert tight.resident_bytes == int(1000 * MIB * GPU_SHARE) - tight.unit - tight.in_pass
    assert tight.gpu_peak <= 7 * MIB + 1000 * MIB


def test_without_a_budget_half_of_the_ram_stores_and_the_rest_goes_to_disk(wrap, gpu, monkeypatch):
    qnn, footprint = wrap(weight_bits=4), Footprint(stored=10 * MIB, inside={"conv_in": MIB})
    gpu(1000 * MIB)
    monkeypatch.setattr(memory, "available_memory", lambda: 600 * MIB)
    plan = plan_memory(qnn, footprint, samples=100, batch_size=32, budget=None)
    assert (plan.on_gpu, plan.in_ram, plan.on_disk) == (0, 300 * MIB, 700 * MIB)


def test_what_a_walk_takes_at_a_time_is_planned_too(wrap, gpu):
    """A reconstruction of one sample at a time holds less than the forwards of the walk."""
    qnn, footprint = wrap(weight_bits=4), Footprint(stored=MIB, inside={"conv_in": 10 * MIB})
    gpu(4000 * MIB)
    plan = plan_memory(qnn, footprint, samples=100, batch_size=1, budget=None)
    assert plan.in_pass == footprint.forward_batch(plan.pass_bytes, Walker.pass_size) * 10 * MIB > 40 * MIB
    assert plan.gpu_peak <= 4000 * MIB


def test_a_budget_bounds_the_gpu_too(wrap, gpu):
    qnn, footprint = wrap(weight_bits=4), Footprint(stored=10 * MIB, inside={"conv_in": MIB})
    gpu(100 << 30)
    plan = plan_memory(qnn, footprint, samples=100, batch_size=32, budget=600 * MIB)
    assert plan.gpu_peak - plan.held_on_gpu <= 600 * MIB
    assert plan.on_gpu == 0 and plan.in_ram == 600 * MIB and plan.on_disk == 400 * MIB
    assert plan.pass_bytes == (600 * MIB - plan.unit) // 2


def test_sentence_of_a_gpu(wrap, gpu):
    qnn = wrap(weight_bits=4)
    gpu(4000 * MIB)
    text = str(plan_memory(qnn, Footprint(10 * MIB, {"conv_in": MIB}), 100, 32, None))
    assert "of GPU memory (7.0 MiB used already, the current unit " in text
    assert "stored activations 0.98 GiB) and " in text and text.endswith("stored activations 0.0 MiB)")


def test_sentence_names_the_parts():
    use = MemoryUse(3 << 30, 1 << 30, 0, 512 * MIB, 2 << 30, 0, 0, Footprint(0))
    assert str(use) == (
        "about 4.50 GiB (3.00 GiB used already, the current unit 1.00 GiB, stored activations 0.50 GiB, and 2.00 GiB "
        "on disk)"
    )


@pytest.mark.slow
def test_a_batch_in_parts_learns_the_same(wrap, data):
    config = QDiffusionConfig(iterations=4, act_iterations=4, batch_size=6, lr_rounding=0.05)

    def learned(footprint, pass_bytes):
        qnn = wrap(weight_bits=4, act_bits=8)
        run = CalibrationRun(seed=3, show_progress=False, footprint=footprint, pass_bytes=pass_bytes)
        qdiffusion.calibrate(qnn, data, config, run)
        return run.errors

    footprint = measure_footprint(wrap(weight_bits=4, act_bits=8).model, tuple(i[:1] for i in data.inputs))
    whole = learned(None, DEFAULT_PASS)
    tight = max(footprint.inside.values()) * GRADIENT_COPIES * 2
    assert footprint.training_batch(max(footprint.inside, key=footprint.inside.get), tight, 6) == 2
    parts = learned(footprint, tight)
    first = next(iter(whole))
    assert parts[first] == pytest.approx(whole[first], rel=PARTS_TOLERANCE)
    # Planted: a weighting of parts by their number instead of their size is far outside the tolerance.
    assert parts[first] != pytest.approx(whole[first] * 1.01, rel=PARTS_TOLERANCE)
