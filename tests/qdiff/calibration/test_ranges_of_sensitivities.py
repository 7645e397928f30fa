"""Every kind of sensitivity with every way in which a config chooses ranges: estimators, and ranges per timestep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_network import Small

from qdiff.calibration.probed_sensitivity import probed_sensitivities
from qdiff.calibration.sensitivity import Measure, Operand, OutputQuality, layer_sensitivity
from qdiff.calibration.trajectory_sensitivity import trajectory_sensitivities
from qdiff.config import ActRanges, QuantConfig
from qdiff.evaluation.fidelity import mean_ssim
from qdiff.io.images import to_uint8
from qdiff.pipeline import Pipeline
from qdiff.ranges.estimators import ESTIMATORS, RangeMethod
from qdiff.sampling import DiffusionSchedule, Sampler, SamplerOptions, make_beta_schedule

SHAPE, IMAGES, WIDTHS = (1, 12, 12), range(4), (4, 8)
NAMES = ["conv_in", "q", "join"]  # a convolution, a linear layer, and one with two slices
# By how much the loss is smaller at 8 bits than at 4: about 200 times for noise of ε and of x_0, and at least 3 times
# for SSIM of four images. Where quantizers keep a step size of 1, it is the same for every width.
FALLS = 2.5
QUICK = RangeMethod.MIN_MAX, RangeMethod.AVERAGE  # of these, every test takes half a second


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    schedule = DiffusionSchedule(make_beta_schedule("linear", 1e-4, 2e-2, 100))
    made = Pipeline("small", Sampler(schedule, SHAPE, SamplerOptions(steps=3), seed=7), 1, 4)
    made.network = Small().eval()
    return made


def sensitivities(pipeline, measure, config):
    """Losses by operand, layer and width."""
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(16, *SHAPE, generator=generator), torch.arange(16) * 6
    every = pipeline.network, dict.fromkeys(Operand, NAMES), dict.fromkeys(Operand, WIDTHS), config
    if measure is Measure.PROBE:
        found = probed_sensitivities(*every, (x, t), 8, generator)
    elif measure is Measure.TRAJECTORY:
        found = trajectory_sensitivities(pipeline, *every[1:], IMAGES, generator)
    else:
        quality = OutputQuality(pipeline.network, (x, t), 8) if measure is Measure.SQNR else image_quality(pipeline)
        found = {
            operand: {name: layer_sensitivity(every[0], name, config, operand, WIDTHS, quality) for name in NAMES}
            for operand in Operand
        }
    return {o: {n: {b: measure.loss(v) for b, v in w.items()} for n, w in by.items()} for o, by in found.items()}


def image_quality(pipeline):
    @torch.no_grad()
    def images():
        x_0 = pipeline.to_images(pipeline.sample(pipeline.network, IMAGES, calibration=True))
        return torch.from_numpy(to_uint8(x_0)).permute(0, 3, 1, 2)

    in_float = images()
    return lambda: mean_ssim(images(), in_float)


def slow_if(is_slow, values):
    return [pytest.param(value, marks=pytest.mark.slow if is_slow(value) else ()) for value in values]


@pytest.mark.parametrize("act_ranges", ActRanges)
@pytest.mark.parametrize("method", slow_if(lambda method: method not in QUICK, ESTIMATORS))
@pytest.mark.parametrize("measure", slow_if(lambda measure: measure is Measure.SSIM, Measure))
def test_losses_fall_with_the_width(measure, method, act_ranges, pipeline):
    """Ranges are set from what passed; ranges per timestep are measured as one range for all timesteps."""
    shared = QuantConfig(4, 8, split_shortcut=True, weight_range=method, act_range=method)
    found = sensitivities(pipeline, measure, replace(shared, act_ranges=act_ranges))
    seen = [name for name in NAMES if name != "q" or measure is not Measure.SSIM]  # q's noise hardly moves a pixel
    for operand in Operand:
        for name in seen:
            losses = found[operand][name]
            assert 0 < FALLS * losses[8] < losses[4], (operand, name, losses)
    if act_ranges is ActRanges.TIMESTEP:
        assert found == sensitivities(pipeline, measure, shared)
