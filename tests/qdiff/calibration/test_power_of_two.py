"""Finer step sizes of single channels in front of shortcuts: votes, calibration by every method, tables, resuming."""

from __future__ import annotations

import pytest
import torch
from stopped_journal import ResumedJournal, StoppedJournal
from thorough import thorough_except
from uneven_network import uneven, uneven_small

from qdiff import QuantConfig, QuantModel
from qdiff.api import calibrate
from qdiff.calibration.power_of_two import ChannelVotes
from qdiff.calibration.refit import discard_calibration
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.methods.eda_dm import EdaDmConfig
from qdiff.methods.gptq import GptqConfig
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.methods.tfmq_dm import TfmqDmConfig
from qdiff.quantizer import ActQuantizer, TimestepActQuantizer

W4A8 = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True, "power_of_two_scales": True}
METHODS = {
    "linear": None,
    "gptq": GptqConfig(most_rows=64),
    "qdiff": QDiffusionConfig(iterations=2, act_iterations=2, batch_size=4),
    "tfmq-dm": TfmqDmConfig(iterations=2, batch_size=4, temporal_unit=False),
    "eda-dm": EdaDmConfig(iterations=2, batch_size=4),
}
RANGES = ("shared", "timestep")
ROUNDING = 1e-6  # relative, of float32 against float64


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(5)
    return CalibrationSet((torch.randn(12, 1, 8, 8, generator=generator), torch.tensor([10, 500, 990]).repeat(4)))


@pytest.fixture
def wrap(data):
    """``wrap(**config)``: the small network, always with the same float weights, wrapped and not calibrated."""
    return lambda **config: QuantModel(
        uneven_small(), QuantConfig(**{**W4A8, **config}), tuple(i[:2] for i in data.inputs)
    )


def quiet(**kinds):
    return CalibrationRun(show_progress=False, **kinds)


def made(wrap, data, method="linear", run=None, **config):
    qnn = wrap(**config)
    calibrate(qnn, data, method, METHODS[method], run=run or quiet())
    return qnn


def shifts(qnn):
    quantizers = qnn.act_quantizers().items()
    return {n: q.channel_shifts.clone() for n, q in quantizers if q.channel_shifts is not None}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def output(qnn, inputs):
    with qnn.quantized():
        return qnn(*inputs)


def quantizer_of(delta, zero, channels, bits=4):
    found = ActQuantizer(bits, channels=channels)
    found.set(torch.tensor(delta), torch.tensor(zero))
    return found


def quantized(x, delta, zero, bits):
    """The map of the paper, in float64."""
    return (torch.clamp(torch.round(x / delta) + zero, 0, 2**bits - 1) - zero) * delta


def best(x, delta, zero, bits, share):
    """k by channel from samples [N, C, …], one at a time."""
    found = []
    for channel in range(x.shape[1]):
        votes = [0] * 4
        for sample in x[:, channel].double():
            errors = [float((quantized(sample, delta / 2**k, zero, bits) - sample).square().sum()) for k in range(4)]
            votes[errors.index(min(errors))] += 1
        k = max(range(4), key=votes.__getitem__)
        found.append(k if votes[k] >= share * len(x) else 0)
    return found


@pytest.mark.parametrize("shape", [(20, 5, 16), (20, 5, 4, 4)])
def test_votes_are_those_of_the_samples_one_by_one(shape):
    torch.manual_seed(2)
    sizes = torch.tensor([1.0, 0.4, 0.2, 0.1, 0.0]).view(1, -1, *[1] * (len(shape) - 2))
    noise = torch.rand(shape[0], *[1] * (len(shape) - 1)) * 0.5 + 0.5
    x = torch.randn(shape) * sizes * noise
    quantizer = quantizer_of(0.5, 7, 5)
    votes = ChannelVotes(quantizer)
    for batch in x.split(8):  # votes of batches add up
        votes.update(batch)
    found = votes.shifts().tolist()
    assert found == best(x, 0.5, 7, 4, 0.85)
    assert found[-1] == 0, "a channel of zeros keeps the step size"
    assert len(set(found)) > 2 and found != best(x, 0.25, 7, 4, 0.85), "planted: another step size"
    assert found != best(x, 0.5, 7, 4, 0.0), "planted: a channel takes the mode, however few agree"


def test_a_channel_takes_what_85_percent_agree_on():
    small, large = torch.full((1, 1, 4), 0.0625), torch.full((1, 1, 4), 7.5)
    for agreeing, expected in ((16, 0), (17, 3), (20, 3)):
        votes = ChannelVotes(quantizer_of(0.5, 0, 1))
        votes.update(torch.cat([small] * agreeing + [large] * (20 - agreeing)))
        assert votes.shifts().tolist() == [expected], agreeing


@torch.no_grad()
def test_a_quantizer_has_a_step_size_for_each_channel():
    torch.manual_seed(0)
    x, quantizer = torch.randn(3, 4, 5, 5), quantizer_of(0.1, 6, 4)
    before = quantizer(x)
    quantizer.channel_shifts.copy_(torch.tensor([0, 1, 2, 3]))
    wanted = torch.stack([quantized(x[:, c].double(), 0.1 / 2**c, 6, 4) for c in range(4)], 1)
    # δ is float32 here.
    assert float((quantizer(x) - wanted).abs().max()) < ROUNDING
    assert torch.equal(quantizer(x)[:, 0], before[:, 0]) and not torch.equal(quantizer(x)[:, 1], before[:, 1])
    assert torch.equal(quantizer.levels(x).values(), quantizer(x))


def test_the_step_size_is_learned_through_them():
    """Its gradient is the sum of those of the channels' step sizes, each times 2^-k."""
    torch.manual_seed(0)
    x, weights = torch.randn(3, 2, 5).double(), torch.randn(3, 2, 5).double()
    quantizer = quantizer_of(0.25, 6, 2).double()
    quantizer.channel_shifts.copy_(torch.tensor([[0, 2]]))
    quantizer.delta.requires_grad_(True)
    (quantizer(x) * weights).sum().backward()
    wanted = 0.0
    for channel, k in enumerate((0, 2)):
        alone = quantizer_of(0.25 / 2**k, 6, None).double()
        alone.delta.requires_grad_(True)
        (alone(x[:, channel]) * weights[:, channel]).sum().backward()
        wanted += float(alone.delta.grad) / 2**k
    assert float(quantizer.delta.grad) == pytest.approx(wanted, rel=1e-12)
    assert wanted != pytest.approx(0)


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("method", thorough_except(METHODS, "gptq", "qdiff"))
def test_every_method_sets_them(method, ranges, wrap, data):
    qnn = made(wrap, data, method, act_ranges=ranges)
    found = shifts(qnn)
    assert list(found) == [f"join.nin_shortcut.act_quantizers.{i}" for i in (0, 1)]
    assert all(k.shape == (3 if ranges == "timestep" else 1, 8) for k in found.values())
    assert int(found["join.nin_shortcut.act_quantizers.1"].max()) == 3
    assert torch.isfinite(output(qnn, data.inputs)).all()


@pytest.mark.parametrize("ranges", RANGES)
def test_nothing_else_changes(ranges, wrap, data):
    """Ranges before the first shortcut are those without the option; with shifts of 0 so is the output, to the bit."""
    with_them, without = (made(wrap, data, act_ranges=ranges, power_of_two_scales=given) for given in (True, False))
    state = without.state_dict()
    assert shifts(without) == {} and not any("shifts" in name for name in state)
    before = [n for n in state if n.endswith(".delta") and not n.startswith("model.conv_out")]
    assert len(before) > 20 and all(torch.equal(with_them.state_dict()[n], state[n]) for n in before)
    assert not torch.equal(output(with_them, data.inputs), output(without, data.inputs))
    fresh = wrap(act_ranges=ranges)
    zeros = {f"model.{n}.channel_shifts": torch.zeros_like(k) for n, k in shifts(with_them).items()}
    fresh.load_state_dict({**state, **zeros})
    assert torch.equal(output(fresh, data.inputs), output(without, data.inputs))
    if ranges == "timestep":
        assert fresh.act_timesteps.values.tolist() == [10, 500, 990]


@torch.no_grad()
def test_they_are_better_for_most_samples_of_what_shortcuts_take(wrap, data):
    """Not for all: values of the others are clipped."""
    qnn, seen = made(wrap, data), []
    layer = qnn.layers()["join.nin_shortcut"]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output(qnn, data.inputs)
    handle.remove()

    def errors():
        return (layer.quantized_input(seen[0]) - seen[0]).square().sum((2, 3))

    voted, finer = errors(), torch.cat([q.channel_shifts[0] for q in layer.act_quantizers]) > 0
    for quantizer in layer.act_quantizers:
        quantizer.channel_shifts.zero_()
    better = (voted < errors()).float().mean(0)
    assert finer.any() and (better[finer] >= 0.85).all() and (better[~finer] == 0).all()


@torch.no_grad()
def test_a_mixed_batch_is_its_timesteps_one_by_one(wrap, data, relative):
    qnn = made(wrap, data, act_ranges="timestep").double()
    assert any((k != k[:1]).any() for k in shifts(qnn).values()), "timesteps differ"
    x, t = data.inputs[0].double(), data.inputs[1]
    mixed = output(qnn, (x, t))
    for time in t.unique():
        alone = output(qnn, (x[t == time], t[t == time]))
        assert relative(mixed[t == time], alone) < 1e-12
    for quantizer in qnn.act_quantizers().values():  # planted: every timestep has the shifts of another
        if quantizer.channel_shifts is not None:
            quantizer.channel_shifts.copy_(quantizer.channel_shifts.roll(1, 0))
    assert relative(output(qnn, (x, t)), mixed) > 1e-9


@pytest.mark.parametrize("ranges", thorough_except(RANGES, "timestep"))
def test_a_calibration_continues(ranges, wrap, data, tmp_path):
    whole = made(wrap, data, "gptq", act_ranges=ranges)

    stopped, journal = StoppedJournal(tmp_path, lambda count, phase, index: index == 5), ResumedJournal(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made(wrap, data, "gptq", quiet(journal=stopped), act_ranges=ranges)
    resumed = made(wrap, data, "gptq", quiet(journal=journal), act_ranges=ranges)
    assert journal.restored == stopped.count
    assert same(shifts(resumed), shifts(whole))
    assert torch.equal(output(resumed, data.inputs), output(whole, data.inputs))


def test_a_calibration_that_is_discarded(wrap, data):
    qnn = made(wrap, data)
    discard_calibration(qnn)
    assert not any(k.any() for k in shifts(qnn).values())
    calibrate(qnn, data, "linear", run=quiet())
    assert same(shifts(qnn), shifts(made(wrap, data)))


@pytest.mark.slow
def test_calibrated_on_a_gpu(tiny_network, data, cuda):
    qnn = QuantModel(uneven(tiny_network).to("cuda"), QuantConfig(**W4A8, act_ranges="timestep"))
    calibrate(qnn, data, "linear", run=quiet())
    found = shifts(qnn)
    assert all(k.device.type == "cuda" for k in found.values()) and any(k.any() for k in found.values())
    given = tuple(i.to("cuda") for i in data.inputs)
    with qnn.quantized(), cuda.counting() as counts:
        qnn(*given)
    assert counts.waits == []
    assert all(isinstance(q, TimestepActQuantizer) for q in qnn.act_quantizers().values())


def test_a_network_without_shortcuts_is_told(caplog):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 1, 3))
    with caplog.at_level("WARNING", logger="qdiff"):
        QuantModel(network, QuantConfig(**{**W4A8, "split_shortcut": False}))
    assert "has no shortcut convolutions, so --power_of_two_scales has no effect" in caplog.text
