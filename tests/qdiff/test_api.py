"""The job in Python: the examples of docs/api.md run, and what is asked wrongly is one sentence."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

import qdiff
from qdiff.calibration.input_scales import InputScaling
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.timesteps import Spacing
from qdiff.cost.account import account
from qdiff.errors import UserError
from qdiff.methods.eda_dm import EdaDmConfig
from qdiff.methods.gptq import GptqConfig
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.methods.registry import METHODS
from qdiff.pipeline import Pipeline
from qdiff.sampling import DiffusionSchedule, Sampler, SamplerOptions, make_beta_schedule

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sampler(network, rows):
    x = torch.stack([torch.full((1, 8, 8), float(row)) for row in rows])
    for t in (900, 600, 300, 0):
        x = x + 0.01 * network(x, torch.full((len(x),), t))
    return x


@pytest.mark.slow
def test_the_bundled_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    images = example("quantize_bundled").main(str(tmp_path / "q.safetensors"), iterations=3)
    assert images.shape == (8, 1, 16, 16) and torch.isfinite(images).all() and images.std() > 0.3
    assert (tmp_path / "q.safetensors").stat().st_size < 700_000
    said = capsys.readouterr().out.split("ε error ")[1]
    assert 0 < float(said.split()[0]) < 0.1 * float(said.split()[2])


def test_it_takes_less_than_twenty_lines():
    body = (EXAMPLES / "quantize_bundled.py").read_text().split("def main")[1].split("\n\n\nif")[0]
    assert len([line for line in body.splitlines() if line.strip()]) < 20


def test_a_module_of_ones_own(tmp_path, capsys):
    made = example("quantize_your_module").main(str(tmp_path / "mine.safetensors"), iterations=2)
    assert made.shape == (4, 1, 8, 8) and torch.isfinite(made).all()
    assert "3 units fitted" in capsys.readouterr().out and (tmp_path / "mine.safetensors").is_file()


def test_what_is_recorded(tiny_network):
    data = qdiff.record(sampler, tiny_network, count=5, steps=2, batch_size=3)
    x, t = data.inputs
    assert len(data) == 10 and x.shape == (10, 1, 8, 8)
    assert t.tolist() == [900] * 3 + [300] * 3 + [900] * 2 + [300] * 2
    assert x[:3, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]
    ends = qdiff.record(sampler, tiny_network, count=1, steps=3, spacing=Spacing.ENDS).inputs[1]
    assert ends.tolist() == [900, 300, 0]
    for wrong in ({"count": 0, "steps": 2}, {"count": 1, "steps": 5}):
        with pytest.raises(UserError, match="give"):
            qdiff.record(sampler, tiny_network, **wrong)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "qdiff", "eda-dm", "ptq4dm"])
def test_methods_by_name(method, wrap, data):
    configs = {"qdiff": QDiffusionConfig(iterations=1, act_iterations=1), "eda-dm": EdaDmConfig(iterations=1)}
    config = configs.get(method)
    if method == "ptq4dm":
        config = qdiff.methods.ptq4dm.Ptq4dmConfig(iterations=1)
    qnn = wrap(weight_bits=4, act_bits=8)
    errors = qdiff.calibrate(qnn, data, method, config)
    assert bool(errors) == (method != "linear")
    qnn.assert_initialised()
    images = qdiff.sample(sampler, qnn, range(2))
    assert not torch.equal(images, sampler(qnn, range(2)))  # outside it computes in float


def tiny_pipeline(network):
    schedule = DiffusionSchedule(make_beta_schedule("linear", 1e-4, 2e-2, 1000))
    pipeline = Pipeline("tiny", Sampler(schedule, (1, 8, 8), SamplerOptions(steps=3), seed=7), 1, 2)
    pipeline.network = network
    return pipeline


@pytest.mark.slow
def test_widths_of_layers(tiny_network, state_of):
    before = state_of(tiny_network)
    given = METHODS["grip"].quant_config(weight_bits=4, act_bits=8, layer_bits={"conv_in": "W8A8"})
    config = qdiff.choose_widths(tiny_pipeline(tiny_network), given, images=2, show_progress=False)
    after = state_of(tiny_network)
    assert all(torch.equal(before[0][name], value) for name, value in after[0].items()) and before[1:] == after[1:]
    widths = dict(config.layer_bits)
    assert widths["conv_in"] == dict(given.layer_bits)["conv_in"]
    assert len({bits.weight_bits for bits in widths.values()}) > 2 < len({bits.act_bits for bits in widths.values()})
    uniform, chosen = (
        account(qdiff.QuantModel(copy.deepcopy(tiny_network), quant), (1, 8, 8)) for quant in (given, config)
    )
    assert 0.9 * uniform.bops < chosen.bops <= uniform.bops
    data = qdiff.record(sampler, tiny_network, count=4, steps=2)
    qnn = qdiff.QuantModel(tiny_network, config)
    qdiff.calibrate(qnn, data, "grip")
    assert qnn.layers()["conv_in"].weight_quantizers[0].bits == 8
    with pytest.raises(UserError, match="quantized"):
        qdiff.choose_widths(tiny_pipeline(qnn), given)


@pytest.mark.slow
def test_widths_of_weights_alone_where_ranges_are_dynamic(tiny_network):
    """Nothing observes an input, and the answer is that of the same weights with inputs in float."""
    given = METHODS["grip"].quant_config(weight_bits=4, layer_bits={})
    modulated = dataclasses.replace(given, act_bits=4, act_dynamic=True, modulate=True)
    widths = [
        dict(qdiff.choose_widths(tiny_pipeline(tiny_network), config, images=2, show_progress=False).layer_bits)
        for config in (modulated, given)
    ]
    assert widths[0] == widths[1]
    assert {bits.act_bits for bits in widths[0].values()} == {None}
    assert len({bits.weight_bits for bits in widths[0].values()}) > 2


WRONG = {
    "neither weight_bits nor act_bits with calibrated ranges; give": {"weight_bits": None},
    "at least one of these": {"weight_bits": None, "act_bits": 8, "modulate": True, "act_dynamic": True},
    "names nonsense, which is no layer of Model": {"layer_bits": {"nonsense": "W8A8"}, "act_bits": 8},
    "need more bits of weights than the targets allow": {
        "weight_bits": 2,
        "act_bits": 2,
        "layer_bits": {"mid.block_1.conv2": "W32A32"},
    },
    "give first_tokens": {"bos_aware": True, "act_bits": 8},
}


@pytest.mark.parametrize("says", WRONG)
def test_widths_that_cannot_be_chosen_are_told_before_sampling(says, tiny_network, monkeypatch):
    monkeypatch.setattr("qdiff.api.trajectory_sensitivities", None)  # fails if it is called
    with pytest.raises(UserError, match=says):
        qdiff.choose_widths(tiny_pipeline(tiny_network), qdiff.QuantConfig(**{"weight_bits": 4, **WRONG[says]}))


def test_what_is_no_loaded_pipeline(tiny_network):
    config, pipeline = qdiff.QuantConfig(4), tiny_pipeline(tiny_network)
    with pytest.raises(UserError, match="images is 0; give at least 1"):
        qdiff.choose_widths(pipeline, config, images=0)
    with torch.inference_mode(), pytest.raises(UserError, match="call this outside of it"):
        qdiff.choose_widths(pipeline, config)
    del pipeline.network
    for wrong in (pipeline, tiny_network):
        with pytest.raises(UserError, match="whose load"):
            qdiff.choose_widths(wrong, config)


def test_wrong_names_and_configs(wrap, data):
    qnn = wrap(weight_bits=4)
    with pytest.raises(UserError, match="the method is 'brecq'"):
        qdiff.calibrate(qnn, data, "brecq")
    with pytest.raises(UserError, match="config of qdiff is a EdaDmConfig; the method takes a QDiffusionConfig"):
        qdiff.calibrate(qnn, data, "qdiff", EdaDmConfig())
    with pytest.raises(UserError, match="the method takes nothing to set"):
        qdiff.calibrate(qnn, data, "linear", EdaDmConfig())


@pytest.mark.slow
def test_a_second_calibration_forgets_the_first(wrap, data):
    quiet = {"run": CalibrationRun(show_progress=False)}
    used, fresh = wrap(weight_bits=4, act_bits=8), wrap(weight_bits=4, act_bits=8)
    qdiff.calibrate(
        used, data, "gptq", GptqConfig(most_rows=64, bias_correction=True), scaling=InputScaling("search"), **quiet
    )
    names = " ".join(used.model.state_dict())
    assert "float_bias" in names and "input_scale" in names
    for qnn in (used, fresh):
        qdiff.calibrate(qnn, data, "linear", **quiet)
    found, expected = used.model.state_dict(), fresh.model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
