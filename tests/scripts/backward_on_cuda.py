"""What learns on the virtual GPU, run by test_cuda_backward.py in a process with `virtual_cuda.preload`."""

from __future__ import annotations

import importlib
from argparse import Namespace

import pytest
import torch
from cuda_checks import assert_learning_never_waits, assert_sampling_never_waits, pageable_copies_while_learning
from ddim_runs import SCRIPT, W4A8
from families import SCRIPTS
from run_checks import image_bytes, manifest, succeeded
from thorough import thorough_except

from qdiff.benchmark import gpu_networks
from qdiff.calibration.probed_sensitivity import probed_sensitivities
from qdiff.calibration.sensitivity import Operand
from qdiff.calibration.trajectory_sensitivity import trajectory_sensitivities
from qdiff.calibration.weight_noise import WeightNoise
from qdiff.config import QuantConfig
from qdiff.pipeline import Pipeline
from qdiff.sampling import DiffusionSchedule, Sampler, SamplerOptions, make_beta_schedule

DATA = ("--cali_st", 2, "--cali_n", 2)
TENSORS = 6  # of a unit: target, up to two inputs, the same in float, and which samples are in which batch
ITERATIONS = 8
TIMES = ("--cali_iters", ITERATIONS)
FEW = (*DATA, *TIMES, "--cali_iters_a", ITERATIONS, "--cali_batch_size", 2)
SHORT = ("--cali_iters", 3, "--cali_iters_a", 3)  # where one wait for an iteration is seen, and no copies are counted
EDA_DM = ("--calib_num_samples", 4, "--batch_samples", 4, *TIMES, "--cali_batch_size", 2)
QUICK = ("--w_range", "max", "--a_range", "max")
RUNS = {
    "qdiff": (*W4A8, *FEW, *QUICK),
    "fisher": (*W4A8, "--objective", "fisher", *FEW, *SHORT, *QUICK),
    "eda-dm": (*W4A8, "--method", "eda-dm", "--add_loss", 0.8, *EDA_DM, *QUICK),
    "modiff": (*W4A8, "--method", "modiff", "--quant_mode", "qdiff", *FEW, *SHORT, *QUICK),
}
STEPS = ("--timesteps", 4, "--max_images", 2, "--seed", 7)


@pytest.fixture(scope="module")
def learned(call, one_level, tmp_path_factory):
    """``learned(name)``: the folder of a run on the device and what was counted, run once."""
    from virtual_cuda import virtual_cuda

    known = {}

    def run(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("learned")
            with virtual_cuda() as device:
                succeeded(call(SCRIPT, *one_level.options, *STEPS, *RUNS[name], "--device", "cuda", "-l", folder))
            known[name] = folder, device.counts
        return known[name]

    return run


@pytest.mark.parametrize("name", thorough_except(RUNS, "qdiff"))
def test_calibration_and_sampling(name, learned):
    folder, counts = learned(name)
    run = manifest(folder)
    assert run["device"] == "cuda" and len(image_bytes(folder)) == 2
    assert run["activation_quantizers"]["silent"] == [] and len(run["reconstruction_errors"]) > 5
    assert_sampling_never_waits(counts)
    assert_learning_never_waits(counts, len(run["reconstruction_errors"]))


@pytest.mark.parametrize("name", thorough_except(("qdiff", "eda-dm"), "qdiff"))
def test_an_iteration_copies_nothing_from_pageable_memory(name, learned):
    """A unit's tensors come to the device once; one copy for each iteration would be more than that."""
    folder, counts = learned(name)
    units = len(manifest(folder)["reconstruction_errors"])
    assert len(pageable_copies_while_learning(counts)) <= TENSORS * units < ITERATIONS * units


def test_planted_a_number_read_in_every_iteration(call, one_level, tmp_path, cuda, monkeypatch):
    from qdiff.adaptive_rounding import LearnedRounding

    regulariser = LearnedRounding.regulariser

    def reads(self, beta):
        made = regulariser(self, beta)
        made.item()
        return made

    monkeypatch.setattr(LearnedRounding, "regulariser", reads)
    words = (*one_level.options, *STEPS, *RUNS["qdiff"], *SHORT, "--device", "cuda")
    succeeded(call(SCRIPT, *words, "-l", tmp_path))
    units = len(manifest(tmp_path)["reconstruction_errors"])
    with pytest.raises(AssertionError, match=r"item at .*reads.*reconstruction.py"):
        assert_learning_never_waits(cuda.counts, units)


@pytest.mark.thorough  # as on the CPU
def test_an_interrupted_calibration_continues(call, one_level, learned, tmp_path, cuda, monkeypatch):
    from qdiff.calibration.journal import CalibrationJournal

    words = (*one_level.options, *STEPS, *RUNS["qdiff"], "--device", "cuda", "-l", tmp_path)
    finished, record = [], CalibrationJournal.record

    def killed(self, *given):
        if len(finished) == 3:
            raise KeyboardInterrupt
        finished.append(given)
        record(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationJournal, "record", killed)
        assert call(SCRIPT, *words).code == 130
    succeeded(call(SCRIPT, *words))
    assert image_bytes(tmp_path) == image_bytes(learned("qdiff")[0])


def test_sensitivities_of_all_layers_at_once(cuda, tiny_network):
    inputs, names = (torch.randn(8, 1, 8, 8), torch.arange(8) * 100), {Operand.ACTIVATIONS: ["conv_in", "conv_out"]}

    def probed():
        given = {operand: names.get(operand, []) for operand in Operand}, {operand: (8,) for operand in Operand}
        generator = torch.Generator().manual_seed(1)
        return probed_sensitivities(tiny_network, *given, QuantConfig(8, 8), inputs, 4, generator)[Operand.ACTIVATIONS]

    expected = probed()
    tiny_network.to("cuda")
    with cuda.counting() as counts:
        found = probed()
    assert all(found[name][8] == pytest.approx(expected[name][8], abs=0.05) for name in expected)
    unsettled = [wait for wait in counts.waits if not any(frame.function == "settle" for frame in wait.stack)]
    reads = [wait for wait in unsettled if wait.kind != "H2D copy"]
    assert len(reads) == 1 + len(found), reads  # the signal, and what was found


class Bare(Pipeline):
    def conditions(self, rows, calibration):
        return None, None


def waits_of_trajectories(cuda, network, steps, images):
    """What a GPU is waited for while the sensitivities of a sampler's result are estimated, two images at a time."""
    schedule = DiffusionSchedule(make_beta_schedule("linear", 1e-4, 2e-2, 1000))
    pipeline = Bare("bare", Sampler(schedule, (1, 8, 8), SamplerOptions(steps=steps, scale=1.0), seed=7), 1, 2)
    pipeline.network, pipeline.device = network, torch.device("cuda", 0)
    names, widths = (dict.fromkeys(Operand, value) for value in (["conv_in", "conv_out"], (3, 8)))
    config = QuantConfig(4, 8, weight_range="mse", act_range="quick")
    with cuda.counting() as counts:
        trajectory_sensitivities(pipeline, names, widths, config, range(images), torch.Generator().manual_seed(3))
    return list(map(str, counts.waits))


def test_trajectories_wait_as_often_whatever_their_number_and_length(cuda, tiny_network, monkeypatch):
    """Layers are made and read one after another; no call, forward or backward, and no batch waits."""
    tiny_network.to("cuda")
    one, longer, more = (waits_of_trajectories(cuda, tiny_network, *size) for size in ((2, 2), (4, 2), (2, 4)))
    assert len(one) == len(longer) == len(more) > 0, (set(longer) | set(more)) - set(one)
    add = WeightNoise._add

    def reads(self, x, gradient):
        gradient.sum().item()
        add(self, x, gradient)

    monkeypatch.setattr(WeightNoise, "_add", reads)
    assert len(waits_of_trajectories(cuda, tiny_network, 2, 2)) == len(one) + 2 * (2 + 1)  # the last call once more


PARTS = ("gpu_machine:machine_lines", "gpu_networks:cifar10_lines")


@pytest.mark.parametrize("part", thorough_except(PARTS, PARTS[0]))
def test_parts_of_the_gpu_check(part, cuda, monkeypatch):
    # Two calls of a network each time, of which one is timed; on a GPU they are 13.
    monkeypatch.setattr(gpu_networks, "WARM_UP", 1)
    monkeypatch.setattr(gpu_networks, "CALLS", 1)
    module, name = part.split(":")
    lines = getattr(importlib.import_module(f"qdiff.benchmark.{module}"), name)
    lines = lines(Namespace(small=True, device="cuda"), SCRIPTS)
    found = {line.what: line for line in lines}
    assert len(found) > 3 and not any(line.good is False for line in found.values())


def test_widths_chosen_through_the_sampler(call, one_level, tmp_path, cuda):
    """The trajectories, their gradients and the kept rows are on the device; what is chosen is what the CPU chooses."""
    words = (*one_level.options, *STEPS, *W4A8, "--method", "grip", *DATA, "--sensitivity_samples", 2)
    for device in ("cpu", "cuda"):
        succeeded(call(SCRIPT, *words, "--device", device, "-l", tmp_path / device))
    chosen = [(tmp_path / device / "widths.json").read_bytes() for device in ("cpu", "cuda")]
    assert chosen[0] == chosen[1] and manifest(tmp_path / "cuda")["device"] == "cuda"
