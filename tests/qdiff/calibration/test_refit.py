"""A network calibrated again on its own trajectory: what is recorded, and that the second fit starts anew."""

from __future__ import annotations

import copy
from math import sqrt

import pytest
import torch
from omegaconf import OmegaConf

import qdiff
from ddim.pipeline import DdimPipeline
from qdiff.calibration.collect import record_draw, record_evenly
from qdiff.calibration.input_scales import InputScaling, Scaling
from qdiff.calibration.refit import discard_calibration
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet, select_samples
from qdiff.calibration.timesteps import Draw, Schedule
from qdiff.config import ActRanges, QuantConfig
from qdiff.errors import UserError
from qdiff.methods import linear
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import RangeMethod
from qdiff.sampling import SamplerOptions

SEED, STEPS, SHAPE = 5, 4, (1, 8, 8)
# Relative, of one DDIM step in float32 against float64; a step with ε of the float network is off by 2e-2 and more.
STEP_TOLERANCE = 1e-5
QUICK = QDiffusionConfig(iterations=2, batch_size=4, bias_correction=True)
MIN_MAX = {"weight_range": RangeMethod.MIN_MAX, "act_range": RangeMethod.MIN_MAX}
TIMESTEPS = {"weight_bits": 4, "act_bits": 8, "act_ranges": ActRanges.TIMESTEP, **MIN_MAX}
KINDS = {
    "corrected biases": ({"weight_bits": 4, "split_shortcut": True, **MIN_MAX}, "qdiff", QUICK, None),
    "ranges per timestep": (TIMESTEPS, "linear", None, None),
    "scaled inputs": ({"weight_bits": 3, "act_bits": 6, **MIN_MAX}, "linear", None, InputScaling(Scaling.DILATE)),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def pipeline(tiny_config, tiny_network, tmp_path):
    OmegaConf.save(tiny_config, tmp_path / "tiny.yml")
    made = DdimPipeline(tmp_path / "tiny.yml", "none", SamplerOptions("ddim", STEPS), SEED, batch_size=2)
    made.network = tiny_network
    return made


@pytest.fixture
def data(data):
    """The samples of the engine's tests at three timesteps."""
    x, t = data.inputs
    return CalibrationSet((x, t // 400 * 400))


def calibrated(network, data, kind) -> QuantModel:
    config, method, recipe, scaling = KINDS[kind]
    qnn = network if isinstance(network, QuantModel) else QuantModel(network, QuantConfig(**config))
    qdiff.calibrate(qnn, data, method, recipe, run=CalibrationRun(show_progress=False), scaling=scaling)
    return qnn


def quantized(pipeline, data, **config) -> QuantModel:
    qnn = QuantModel(pipeline.network, QuantConfig(**MIN_MAX, **config))
    qdiff.calibrate(qnn, data, "linear", run=CalibrationRun(show_progress=False))
    return qnn


def differing(qnn: QuantModel, other: QuantModel) -> list[str]:
    a, b = qnn.state_dict(), other.state_dict()
    return sorted(n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n]))


# --- Starting anew


@pytest.mark.slow
@EVERY_KIND
def test_nothing_of_a_calibration_is_left(kind, tiny_network, data):
    fresh = QuantModel(copy.deepcopy(tiny_network), QuantConfig(**KINDS[kind][0]))
    qnn = calibrated(copy.deepcopy(tiny_network), data, kind)
    assert differing(qnn, fresh)
    discard_calibration(qnn)
    assert differing(qnn, fresh) == []
    with torch.no_grad():
        assert torch.equal(qnn(*data.inputs), tiny_network(*data.inputs))


@pytest.mark.slow
@EVERY_KIND
def test_a_second_fit_is_the_first_fit_on_its_data(kind, tiny_network, data):
    x, t = data.inputs
    other = CalibrationSet((1.3 * x.flip(0), t))
    wanted = calibrated(copy.deepcopy(tiny_network), other, kind)
    again = calibrated(copy.deepcopy(tiny_network), data, kind)
    assert differing(again, wanted)
    discard_calibration(again)
    calibrated(again, other, kind)
    assert differing(again, wanted) == []


@pytest.mark.slow
def test_what_would_stay_without_it(tiny_network, data):
    """Planted: a method, which sets no scales, calibrates a scaled network again."""
    plain = quantized_in_float(tiny_network, data)
    scaled = calibrated(copy.deepcopy(tiny_network), data, "scaled inputs")
    linear.calibrate(scaled, data, None, CalibrationRun(show_progress=False))
    assert any("input_scale" in name for name in differing(scaled, plain))
    discard_calibration(scaled)
    linear.calibrate(scaled, data, None, CalibrationRun(show_progress=False))
    assert differing(scaled, plain) == []


def quantized_in_float(network, data) -> QuantModel:
    qnn = QuantModel(copy.deepcopy(network), QuantConfig(**KINDS["scaled inputs"][0]))
    qdiff.calibrate(qnn, data, "linear", run=CalibrationRun(show_progress=False))
    return qnn


@pytest.mark.parametrize("form", ["released", "packed"])
def test_without_float_weights_nothing_is_changed(form, calibrated, data):
    qnn = calibrated(weight_bits=4, act_bits=8)
    qnn.release_float_weights() if form == "released" else qnn.pack_weights()
    before = copy.deepcopy(qnn)
    with pytest.raises((UserError, RuntimeError), match=form):
        discard_calibration(qnn)
    assert differing(qnn, before) == []


# --- The recording


def step_errors(pipeline, qnn, xs, ts, in_quantized=True) -> list[float]:
    """Return how far each recorded input is from the DDIM step from the one before, relative, in float64."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    errors = []
    for i in range(len(xs) - 1):
        with torch.no_grad():
            if in_quantized:
                with qnn.quantized():
                    eps = qnn(xs[i], ts[i]).double()
            else:
                eps = qnn(xs[i], ts[i]).double()
        a, a_next = (float(alpha_bar[int(t[0])]) for t in (ts[i], ts[i + 1]))
        x0 = (xs[i].double() - sqrt(1 - a) * eps) / sqrt(a)
        wanted = sqrt(a_next) * x0 + sqrt(1 - a_next) * eps
        errors.append(float((xs[i + 1] - wanted).norm() / wanted.norm()))
    return errors


@pytest.mark.slow
def test_the_quantized_trajectory_is_recorded(pipeline, data):
    qnn = quantized(pipeline, data, weight_bits=3, act_bits=4)
    in_float = record_evenly(pipeline, STEPS, 2, first=3, show_progress=False)
    own = record_evenly(pipeline, STEPS, 2, first=3, show_progress=False, qnn=qnn)
    assert own.keys() == in_float.keys() and own["xs"].shape == in_float["xs"].shape == (STEPS, 2, *SHAPE)
    assert torch.equal(own["ts"], in_float["ts"])
    assert torch.equal(own["xs"][0], in_float["xs"][0]), "the noise is that of the first recording"
    errors = step_errors(pipeline, qnn, own["xs"], own["ts"])
    assert len(errors) == STEPS - 1 and max(errors) < STEP_TOLERANCE
    # Planted: the float network is recorded again.
    assert min(step_errors(pipeline, qnn, in_float["xs"], in_float["ts"])) > 100 * STEP_TOLERANCE
    assert max(step_errors(pipeline, qnn, in_float["xs"], in_float["ts"], in_quantized=False)) < STEP_TOLERANCE


@pytest.mark.slow
def test_a_modulated_network_records_each_batch_as_a_trajectory(pipeline, data):
    qnn = quantized(pipeline, data, weight_bits=4, act_bits=3, act_dynamic=True, modulate=True)
    own = record_evenly(pipeline, 3, 3, show_progress=False, pairs=True, qnn=qnn)
    for rows in ([0, 1], [2]):
        seen = []
        with torch.no_grad(), qnn.quantized(), qnn.trajectory():
            pipeline.sampler(qnn, rows, calibration=True, on_call=lambda x, t, *_, seen=seen: seen.append(x.clone()))
        assert torch.equal(own["xs"][:, rows], torch.stack(seen[1:]))
        assert torch.equal(own["xs_prev"][:, rows], torch.stack(seen[:-1]))
    in_float = record_evenly(pipeline, 3, 3, show_progress=False, pairs=True)
    assert float((own["xs"] - in_float["xs"]).abs().max()) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("schedule", list(Schedule))
def test_a_draw_has_the_same_images_at_the_same_steps(schedule, pipeline, data):
    qnn = quantized(pipeline, data, weight_bits=3, act_bits=4)
    draw = Draw(schedule, 6, 3)
    (one, allocation, times), (own, again, own_times) = (
        record_draw(pipeline, draw, 1, first=2, qnn=network) for network in (None, qnn)
    )
    assert times == own_times and [len(x) for x in one["xs"]] == [len(x) for x in own["xs"]]
    assert all(torch.equal(a, b) for a, b in zip(one["ts"], own["ts"], strict=True))
    assert (allocation is None) == (again is None) == (schedule is not Schedule.TDAC)
    whole = record_evenly(pipeline, STEPS, 6, first=2, show_progress=False, qnn=qnn)
    for x, t in zip(own["xs"], own["ts"], strict=True):
        at = whole["xs"][whole["ts"][:, 0].tolist().index(t[0])]
        for image in x:  # other batches sum in another order, which moves values over rounding edges
            assert float((at - image).flatten(1).norm(dim=1).min() / image.norm()) < 0.05


@pytest.mark.slow
def test_python_in_a_few_lines(pipeline):
    """As in docs/api.md."""
    sampler = lambda network, rows: pipeline.sample(network, rows, calibration=True)  # noqa: E731
    qnn = QuantModel(pipeline.network, QuantConfig(weight_bits=3, act_bits=4, **MIN_MAX))
    qdiff.calibrate(qnn, qdiff.record(sampler, qnn, count=2, steps=STEPS), "linear")
    with qnn.quantized(), qnn.trajectory():
        own = qdiff.record(sampler, qnn, count=2, steps=STEPS)
    recorded = record_evenly(pipeline, STEPS, 2, show_progress=False, qnn=qnn)
    assert torch.equal(own.inputs[0], select_samples(recorded, None, None, SHAPE).inputs[0])
    discard_calibration(qnn)
    qdiff.calibrate(qnn, own, "linear")


@pytest.mark.slow
def test_on_a_gpu(cuda, pipeline, data):
    """The host waits for what is kept of a step, and for nothing else while sampling."""
    qnn = quantized(pipeline, data, weight_bits=4, act_bits=8)
    wanted = record_evenly(pipeline, 2, 2, show_progress=False, qnn=qnn)
    pipeline.move_to(torch.device("cuda", 0))
    qnn.to("cuda")
    with cuda.counting() as counts:
        found = record_evenly(pipeline, 2, 2, show_progress=False, qnn=qnn)
    assert counts.launches > 0 and counts.waits_inside("qdiff/sampling/", but=("qdiff/calibration/recording.py",)) == []
    torch.testing.assert_close(found["xs"], wanted["xs"], rtol=0, atol=0.05)
    discard_calibration(qnn)
    assert not any(bool(q.initialised) for q in qnn.act_quantizers().values())
