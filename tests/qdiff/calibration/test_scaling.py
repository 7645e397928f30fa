"""Input scales of a whole network, before any method: they resume at a unit, and every method goes on from them."""

from __future__ import annotations

import copy

import pytest
import torch
from small_network import Small

from qdiff.api import calibrate
from qdiff.calibration import scaling as network_scaling
from qdiff.calibration.input_scales import InputScaling
from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.run import CalibrationRun
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.config import QuantConfig
from qdiff.methods.dmq import DmqConfig
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.modes import scaled_layers
from qdiff.quant_model import QuantModel

LEARNED = InputScaling("learned", iterations=2, batch_size=4)


@pytest.fixture
def small(data):
    torch.manual_seed(0)
    network = Small().eval()

    def wrapped(**config):
        example = tuple(i[:2] for i in data.inputs)
        config = QuantConfig(**{"weight_bits": 4, "act_bits": 8, "split_shortcut": True, **config})
        return QuantModel(copy.deepcopy(network), config, example, ends=("conv_in", "conv_out"))

    return wrapped


def scaled(qnn, data, settings, journal=None, seed=0):
    run = CalibrationRun(seed, journal=journal, show_progress=False)
    network_scaling.set_input_scales(qnn, data, settings, run)
    return {name: layer.input_scale for name, layer in qnn.layers().items()}


def same(one, other):
    """Whether the scales of all layers are the same to the bit; the layer of one channel has none."""
    return all(a is other[n] or torch.equal(a, other[n]) for n, a in one.items())


@pytest.mark.parametrize("kind", ["dilate", "search", "learned"])
def test_layers_are_scaled_and_the_float_network_stays(kind, small, data, held_out):
    qnn = small()
    before = qnn(*held_out)
    scales = scaled(qnn, data, InputScaling(kind, iterations=2))
    assert len(scaled_layers(qnn.model)) >= len(scales) // 2
    assert torch.equal(qnn(*held_out), before)
    other = small()
    again = scaled(other, data, InputScaling(kind, iterations=2))
    assert same(scales, again)


@pytest.mark.parametrize("kind", ["dilate", "search", "learned"])
def test_a_network_in_double_has_scales_in_double(kind, small, data):
    doubled = type(data)((data.inputs[0].double(), data.inputs[1]))
    scales = [s for s in scaled(small().double(), doubled, InputScaling(kind, iterations=2)).values() if s is not None]
    assert scales and all(s.dtype == torch.float64 for s in scales)
    assert any(not torch.equal(s, s.float().double()) for s in scales)


def test_none_scales_nothing(small, data):
    assert not any(s is not None for s in scaled(small(), data, InputScaling()).values())


@pytest.mark.slow
def test_an_interrupted_walk_goes_on_at_the_next_unit(small, data, tmp_path, monkeypatch):
    whole = scaled(small(), data, LEARNED)
    done, original = [], network_scaling._scale_unit

    def interrupted(qnn, opened, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(opened.unit.name)
        original(qnn, opened, *rest)

    monkeypatch.setattr(network_scaling, "_scale_unit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scaled(small(), data, LEARNED, CalibrationJournal(tmp_path, {}))
    again = []
    monkeypatch.setattr(
        network_scaling, "_scale_unit", lambda q, o, *r: (again.append(o.unit.name), original(q, o, *r))
    )
    resumed = scaled(small(), data, LEARNED, CalibrationJournal(tmp_path, {}))
    assert again and not set(done) & set(again)
    assert same(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "config", "quant"),
    [
        ("gptq", None, {}),
        ("qdiff", QDiffusionConfig(iterations=2, act_iterations=2), {}),
        ("dmq", DmqConfig(iterations=2), {"act_ranges": "timestep"}),
    ],
)
def test_methods_go_on_from_scales(method, config, quant, small, data, run_quantized, relative, tmp_path):
    qnn = small(weight_bits=8, **quant)
    calibrate(qnn, data, method, config, run=CalibrationRun(show_progress=False), scaling=LEARNED)
    assert scaled_layers(qnn.model)
    found = run_quantized(qnn, data.inputs)
    assert relative(found, qnn(*data.inputs)) < 0.05  # weights without their factors give 0.1 and more
    save_checkpoint(qnn, tmp_path / "q.safetensors")
    again = small(weight_bits=8, **quant)
    load_checkpoint(again, tmp_path / "q.safetensors")
    assert torch.equal(run_quantized(again, data.inputs), found)


def test_kept_weights_keep_their_scales(small, data):
    qnn = small()
    calibrate(qnn, data, "linear", run=CalibrationRun(show_progress=False))
    calibrate(qnn, data, "gptq", run=CalibrationRun(weights=False, show_progress=False), scaling=LEARNED)
    assert not scaled_layers(qnn.model)
