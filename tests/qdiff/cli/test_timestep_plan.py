"""``--act_ranges`` from the options to a run: what it sets, when it contradicts others, and what is checked first."""

from __future__ import annotations

import copy

import pytest
import torch

from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, ignored_options, resolve_ptq
from qdiff.cli.quantize import Quantization
from qdiff.cli.run_folder import RunFolder
from qdiff.config import ActRanges
from qdiff.errors import UserError
from qdiff.ranges.estimators import RangeMethod
from qdiff.sampling import DiffusionSchedule, make_beta_schedule
from qdiff.sampling.registry import SAMPLERS, SamplerOptions
from qdiff.sampling.sampler import Sampler

SHAPE = (1, 8, 8)
TIMES = (750.0, 500.0, 250.0, 0.0)


def parsed(*words):
    parser = Parser(None)
    add_ptq_options(parser)
    return parser.parse_args([str(w) for w in words])


def plan(*words):
    return resolve_ptq(parsed("--ptq", *words), RangeMethod.MIN_MAX, RangeMethod.MIN_MAX)


def test_the_option():
    assert plan("--quant_act", "--act_ranges", "timestep").quant.act_ranges is ActRanges.TIMESTEP
    shared = plan("--quant_act", "--act_ranges", "shared")
    assert shared.to_dict() == plan("--quant_act").to_dict()  # so that runs from before can be continued
    assert "--act_ranges" in ignored_options(parsed("--act_ranges", "timestep"))[0]
    assert plan("--quant_act", "--a_range", "ema").quant.act_range == RangeMethod.AVERAGE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--act_ranges timestep needs quantized activations; add --quant_act"),
        (("--quant_act", "--quant_mode", "dynamic"), "contradicts --quant_mode dynamic"),
        (("--quant_act", "--modulate"), "contradicts --modulate"),
    ],
)
def test_contradictions(words, message):
    with pytest.raises(UserError, match=message) as caught:
        plan(*words, "--act_ranges", "timestep")
    assert "\n" not in str(caught.value)


def prepared(network, folder, times, visited=TIMES):
    x = torch.randn(len(times), 2, *SHAPE, generator=torch.Generator().manual_seed(0))
    made = plan("--method", "linear", "--quant_act", "--act_ranges", "timestep", "--cali_st", len(times), "--cali_n", 2)
    run = RunFolder(folder, made.to_dict(), 1)
    given = Quantization(copy.deepcopy(network), made, run, SHAPE, None, 1000, lambda: visited)
    recording = {"xs": x, "ts": torch.tensor(times)[:, None].expand(-1, 2)}
    return given, lambda: recording


@pytest.mark.slow
def test_a_run_with_other_steps(tiny_network, tmp_path):
    quantization, record = prepared(tiny_network, tmp_path / "run", TIMES)
    quantization.run.open()
    qnn = quantization.complete(0, record, show_progress=False)
    assert qnn.act_timesteps.values.tolist() == sorted(TIMES)
    again, _ = prepared(tiny_network, tmp_path / "run", TIMES, visited=range(0, 1000, 100))
    assert again.is_calibrated and again.qnn.act_timesteps.values.tolist() == sorted(TIMES)
    with pytest.raises(UserError, match="timestep 1200"):
        prepared(tiny_network, tmp_path / "run", TIMES, visited=(1200,))


def test_steps_that_are_not_covered_are_found_before_calibration(tiny_network, tmp_path):
    quantization, record = prepared(tiny_network, tmp_path / "run", (750.0, 700.0))
    quantization.run.open()
    with pytest.raises(UserError, match=r"timestep 500, .* 2 timesteps from 700 to 750; calibrate at more"):
        quantization.complete(0, record, show_progress=False)
    assert not (tmp_path / "run" / "quantized.safetensors").exists()


@pytest.mark.parametrize("kind", SAMPLERS)
def test_visited_timesteps_are_those_of_the_calls(kind):
    schedule = DiffusionSchedule(make_beta_schedule("linear", 1e-4, 0.02, 1000))
    sampler, called = Sampler(schedule, SHAPE, SamplerOptions(kind, 10), seed=1), []

    def network(x, t):
        called.append(float(t[0]))
        return torch.zeros_like(x)

    sampler(network, [0, 1])
    assert sampler.visited() == called and len(called) == sampler.calls
