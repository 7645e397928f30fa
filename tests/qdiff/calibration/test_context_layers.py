"""The layers that read a context, found by running the network; and what calibration makes of its first token."""

from __future__ import annotations

import pytest
import torch
from text_network import MAGNITUDE, READERS, other_texts, text_data, text_network, texts, wrapped
from torch import nn

import qdiff
from qdiff.calibration.first_token import find_first_tokens
from qdiff.calibration.input_moments import InputMoments
from qdiff.calibration.input_scales import InputScaling
from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.probed_sensitivity import probed_sensitivities
from qdiff.calibration.refit import discard_calibration
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.sensitivity import Operand, OutputQuality, layer_sensitivity
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.modes import first_tokens

QUIET = {"run": CalibrationRun(show_progress=False)}


class Joined(nn.Module):
    """Takes the context as a part of one condition, behind other numbers, and has a layer that takes it and more."""

    def __init__(self):
        super().__init__()
        self.network, self.pooled = text_network(), nn.Linear(8, 2)
        self.both = nn.Linear(8, 2)

    def forward(self, x, t, condition):
        first, context = condition.flatten(1).split([3, 40], dim=1)
        context = context.reshape(-1, 5, 8)
        x = x + self.pooled(context.mean(1))[:, :, None, None] + first[:, :2, None, None]
        return self.network(x, t, context) + (self.both(context) - self.both(context * 2)).mean(1)[:, :, None, None]


@torch.no_grad()
def test_found_in_a_network_and_in_one_that_joins_its_conditions():
    x, t, context = texts()
    joined = torch.cat([torch.randn(6, 3), context.flatten(1)], dim=1)[:, None]
    for network, inputs, prefix in ((text_network(), (x, t, context), ""), (Joined(), (x, t, joined), "network.")):
        found = find_first_tokens(network, inputs)
        assert list(found) == [f"{prefix}{name}" for name in READERS]
        key, value = found.values()
        assert torch.equal(key.input, context[0, 0]) and value.input is None
        for name, token in found.items():
            assert torch.allclose(token.output, network.get_submodule(name)(context[0, 0]))


def test_a_first_token_that_differs_is_one_sentence():
    with pytest.raises(UserError, match=r"not the same for all samples \(number 5 differs .*; leave out --bos_aware"):
        qdiff.calibrate(wrapped(), CalibrationSet(other_texts()), "linear")


def test_a_single_token_and_no_context_are_refused():
    x, t, context = texts()
    with pytest.raises(UserError, match="the context is a single token"):
        find_first_tokens(text_network(), (x, t, context[:, :1]))
    with pytest.raises(UserError, match="no layer that is quantized reads a context"):
        find_first_tokens(nn.Sequential(nn.Linear(8, 8)), (x, t, context), lambda network, x, t, c: network(c * 2))
    alone = wrapped(layer_bits=dict.fromkeys(READERS, "W32A32"))
    with pytest.raises(UserError, match="no layer that is quantized reads a context"):
        qdiff.calibrate(alone, text_data(), "linear")


def settings(method):
    config = qdiff.methods.registry.find_method(method).config
    names = {"iterations": 2, "act_iterations": 2, "batch_size": 4}
    return None if config is None else config(**{n: v for n, v in names.items() if n in config.__dataclass_fields__})


@torch.no_grad()
@pytest.mark.parametrize("range_method", ["max", "mse"])
@pytest.mark.parametrize("method", ["gptq", "qdiff", "eda-dm"])
def test_no_range_knows_the_first_token(method, range_method):
    import qdiff.methods.registry

    qnn = wrapped(act_range=range_method)
    qdiff.calibrate(qnn, text_data(), method, settings(method), **QUIET)
    for name in READERS:
        (quantizer,) = qnn.layers()[name].act_quantizers
        assert float(quantizer.delta) * 255 < 0.2 * MAGNITUDE
    plain = wrapped(bos_aware=False, act_range=range_method)
    qdiff.calibrate(plain, text_data(), method, settings(method), **QUIET)
    assert float(plain.layers()[READERS[0]].act_quantizers[0].delta) * 255 > MAGNITUDE


@torch.no_grad()
def test_rounding_in_closed_form_sees_the_other_tokens_alone(monkeypatch):
    seen = {}
    add = InputMoments.add

    def noted(self, x, quantized, first=0):
        seen.setdefault(self.layer, []).append((x, quantized))
        add(self, x, quantized, first)

    monkeypatch.setattr(InputMoments, "add", noted)
    qnn, data = wrapped(), text_data()
    qdiff.calibrate(qnn, data, "gptq", **QUIET)
    for name in READERS:
        layer = qnn.layers()[name]
        x, quantized = (torch.cat(part) for part in zip(*seen[layer], strict=True))
        assert torch.equal(x.sort(0).values, data.inputs[2][:, 1:].sort(0).values)
        assert torch.equal(quantized, layer.act_quantizers[0](x))


@pytest.mark.slow
@torch.no_grad()
def test_input_scales_are_of_the_other_tokens():
    qnn, data = wrapped(), text_data()
    qdiff.calibrate(qnn, data, "linear", scaling=InputScaling("search"), **QUIET)
    data.inputs[2][:, 0] *= 3
    again = wrapped()
    qdiff.calibrate(again, data, "linear", scaling=InputScaling("search"), **QUIET)
    for name in READERS:
        assert torch.equal(qnn.layers()[name].input_scale, again.layers()[name].input_scale)
    with qnn.quantized():
        assert qnn(*texts()).isfinite().all()


@torch.no_grad()
def test_calibrating_again_gives_the_same():
    qnn = wrapped()
    qdiff.calibrate(qnn, text_data(), "gptq", **QUIET)
    before = {name: t.clone() for name, t in qnn.state_dict().items()}
    discard_calibration(qnn)
    assert len(first_tokens(qnn.model)) == 2
    qdiff.calibrate(qnn, text_data(), "gptq", **QUIET)
    assert all(torch.equal(t, before[name]) for name, t in qnn.state_dict().items())


@torch.no_grad()
def test_an_interrupted_calibration_goes_on(tmp_path):
    found = []
    for _ in range(2):
        journal = CalibrationJournal(tmp_path, {"bos_aware": True})
        found.append(wrapped())
        run = CalibrationRun(show_progress=False, journal=journal)
        qdiff.calibrate(found[-1], text_data(), "gptq", run=run)
        next(tmp_path.glob("*-001.safetensors")).unlink()  # the block is fitted again, between units that are there
    first, second = (qnn.state_dict() for qnn in found)
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


@pytest.mark.parametrize("operand", list(Operand))
def test_sensitivities_are_without_the_first_token(operand):
    network, inputs, config = text_network(), texts(count=32), QuantConfig(8, 8, bos_aware=True)
    tokens, name = find_first_tokens(network, inputs), READERS[1]
    quality = OutputQuality(network, inputs, 32)
    plain = layer_sensitivity(network, name, config, operand, [4], quality)[4]
    found = layer_sensitivity(network, name, config, operand, [4], quality, tokens[name])[4]
    assert found > plain + 10  # dB
    names, widths = {o: [name] if o is operand else [] for o in Operand}, {o: [4] for o in Operand}
    probed = [
        probed_sensitivities(network, names, widths, config, inputs, 32, torch.Generator().manual_seed(0), given)
        for given in (tokens, {})
    ]
    with_tokens, without = (p[operand][name][4] for p in probed)
    assert with_tokens > without + 10 and abs(with_tokens - found) < 6  # few projections
