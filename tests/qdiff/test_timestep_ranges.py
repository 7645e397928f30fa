"""Ranges per timestep in a network: observed per timestep, taken in every call, kept in files."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from small_network import Small
from stopped_journal import ResumedJournal, StoppedJournal
from torch import nn

from qdiff import QuantConfig, QuantModel
from qdiff.api import calibrate
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.checkpoint import load_checkpoint, load_packed, save_checkpoint
from qdiff.config import ActRanges
from qdiff.deploy.onnx_export import check_exportable
from qdiff.errors import UserError
from qdiff.methods.eda_dm import EdaDmConfig
from qdiff.methods.gptq import GptqConfig
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.quantizer import TimestepActQuantizer
from qdiff.ranges.qparams import qparams

W4A8 = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True, "act_ranges": "timestep"}
TIMES = (10, 500, 990)
METHODS = {
    "linear": None,
    "gptq": GptqConfig(most_rows=64),
    "qdiff": QDiffusionConfig(iterations=2, act_iterations=2, batch_size=4),
    "eda-dm": EdaDmConfig(iterations=2, batch_size=4),
}
SUMMATION = 1e-3  # relative; a value on a rounding edge may fall to the other side where sums have another order


@pytest.fixture
def data():
    """Samples at three timesteps, mixed, the larger the noisier."""
    generator = torch.Generator().manual_seed(5)
    t = torch.tensor(TIMES).repeat(4)
    return CalibrationSet((torch.randn(12, 1, 8, 8, generator=generator) * (0.2 + t / 500).view(-1, 1, 1, 1), t))


@pytest.fixture
def wrap(data):
    """``wrap(**config)``: the small network, always with the same float weights, wrapped and not calibrated."""

    def wrapped(**config):
        return QuantModel(small(), QuantConfig(**config), tuple(i[:2] for i in data.inputs))

    return wrapped


@pytest.fixture
def tiny(tiny_network):
    """``tiny(device)``: the tiny DDIM network, whose layers all multiply integers."""
    return lambda device="cpu": QuantModel(copy.deepcopy(tiny_network).to(device), QuantConfig(**W4A8))


def small():
    torch.manual_seed(0)
    return Small().eval()


def quiet(**kinds):
    return CalibrationRun(show_progress=False, **kinds)


def made(wrap, data, method="linear", config=W4A8, run=None):
    qnn = wrap(**config)
    calibrate(qnn, data, method, METHODS[method], run=run or quiet())
    return qnn


def tables(qnn):
    quantizers = qnn.act_quantizers().items()
    return {n: (q.delta.clone(), q.zero_point.clone()) for n, q in quantizers if isinstance(q, TimestepActQuantizer)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for n in a for x, y in zip(a[n], b[n], strict=True))


@torch.no_grad()
def output(qnn, inputs):
    with qnn.quantized(), qnn.trajectory():
        return qnn(*inputs)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_observes_each_timestep(method, wrap, data):
    qnn = made(wrap, data, method)
    assert qnn.act_timesteps.values.tolist() == list(TIMES)
    found = tables(qnn)
    assert len(found) == len(qnn.act_quantizers()) > 12
    assert all(delta.shape == (3,) == zero.shape for delta, zero in found.values())
    assert all(q.initialised for q in qnn.act_quantizers().values())
    # The network's input comes first, so its ranges are known without running anything.
    x, t = data.inputs
    for entry, time in enumerate(TIMES):
        some = x[t == time].double()
        delta, zero = qparams(some.min(), some.max(), 8, False)
        first = qnn.model.conv_in.act_quantizers[0]
        assert float(first.delta[entry]) == pytest.approx(float(delta), rel=1e-6)
        assert int(first.zero_point[entry]) == int(zero)
    assert torch.isfinite(output(qnn, data.inputs)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "act_range", ["max", *(pytest.param(r, marks=pytest.mark.slow) for r in ("mse", "ema", "search"))]
)
def test_one_timestep_is_the_shared_range_to_the_bit(method, act_range, wrap, data):
    """Shared ranges of methods that learn them stay as observed at a rate below their last bits.

    Weights of these methods stay in float: roundings and step sizes would be learned at once, and by other gradients.
    """
    one = CalibrationSet((data.inputs[0], torch.full((12,), 500)))
    learns = method in ("qdiff", "eda-dm")
    config = {**W4A8, "act_range": act_range, **({"weight_bits": None} if learns else {})}
    chosen = replace(METHODS[method], lr_act=1e-12) if learns else METHODS[method]
    shared, by_timestep = (
        wrap(**{**config, "act_ranges": ranges}) for ranges in (ActRanges.SHARED, ActRanges.TIMESTEP)
    )
    for qnn in (shared, by_timestep):
        calibrate(qnn, one, method, chosen, run=quiet())
    wanted = {name: (q.delta[None], q.zero_point[None]) for name, q in shared.act_quantizers().items()}
    assert same(tables(by_timestep), wanted)
    for t in (0, 500, 999):
        given = (data.inputs[0], torch.full((12,), t))
        assert torch.equal(output(shared, given), output(by_timestep, given))


@torch.no_grad()
def test_a_mixed_batch_is_its_timesteps_one_by_one(wrap, data, relative):
    qnn = made(wrap, data).double()
    x, t = data.inputs[0].double(), data.inputs[1]
    mixed = output(qnn, (x, t))
    for time in TIMES:
        assert relative(mixed[t == time], output(qnn, (x[t == time], t[t == time]))) < SUMMATION
    assert relative(mixed[t == 10], output(qnn, (x[t == 10], torch.full((4,), 990)))) > 10 * SUMMATION
    doubled = output(qnn, (torch.cat([x, x]), torch.cat([t, t])))  # as guidance does
    assert relative(doubled, torch.cat([mixed, mixed])) < SUMMATION


@torch.no_grad()
def test_ranges_per_timestep_are_closer_where_timesteps_differ(wrap, data):
    """What they are for: at the clean end, where activations are small, one range for all is coarse."""
    errors = {}
    for ranges in ActRanges:
        qnn = made(wrap, data, config={**W4A8, "weight_bits": None, "act_bits": 4, "act_ranges": ranges})
        clean = tuple(i[data.inputs[1] == 10] for i in data.inputs)
        errors[ranges] = float((output(qnn, clean) - qnn(*clean)).square().mean())
    assert errors[ActRanges.TIMESTEP] < 0.5 * errors[ActRanges.SHARED]


@pytest.mark.slow
@pytest.mark.parametrize("packs", [None, False, True])
@torch.no_grad()
def test_files_and_packed_weights(packs, tiny, data, tmp_path, relative):
    qnn, loaded = tiny(), tiny()
    calibrate(qnn, data, "linear", run=quiet())
    save_checkpoint(qnn, tmp_path / "native")
    load_checkpoint(loaded, tmp_path / "native")
    assert same(tables(loaded), tables(qnn)) and torch.equal(loaded.act_timesteps.values, qnn.act_timesteps.values)
    qnn, loaded = qnn.double(), loaded.double()
    x, t = data.inputs[0].double(), data.inputs[1]
    wanted = output(qnn, (x, t))
    if packs is not None:
        loaded.pack_weights(integer=packs)
    assert relative(output(loaded, (x, t)), wanted) < 1e-9 < relative(output(loaded, (x, t.flip(0))), wanted)


@torch.no_grad()
def test_in_float_any_timestep_will_do(wrap, data):
    qnn = made(wrap, data)
    far = data.inputs[0], data.inputs[1] + 5000
    assert torch.equal(qnn(*far), wrap(**W4A8)(*far))
    with pytest.raises(UserError, match="timestep 5010"):
        output(qnn, far)
    with qnn.quantized(activations=False):
        qnn(*far)


def test_its_state_dict_and_a_copy(wrap, data):
    qnn = made(wrap, data)
    other = wrap(**W4A8)
    other.load_state_dict(qnn.state_dict(), strict=True)
    copied = copy.deepcopy(qnn)
    for each in (other, copied):
        assert torch.equal(output(each, data.inputs), output(qnn, data.inputs))
    timesteps = copied.act_timesteps
    assert timesteps is not qnn.act_timesteps
    assert all(q.timesteps is timesteps for q in copied.act_quantizers().values())


@pytest.mark.slow
def test_refusals(wrap, data, tmp_path):
    qnn, shared = made(wrap, data), made(wrap, data, config={**W4A8, "act_ranges": "shared"})
    save_checkpoint(qnn, tmp_path / "native")
    save_checkpoint(shared, tmp_path / "shared")
    save_checkpoint(shared, tmp_path / "published", format="published")
    with pytest.raises(UserError, match="the published format holds one range per quantizer"):
        save_checkpoint(qnn, tmp_path / "x", format="published")
    with pytest.raises(UserError, match="published holds one range per quantizer and none per timestep"):
        load_checkpoint(wrap(**W4A8), tmp_path / "published")
    with pytest.raises(UserError, match="those of one timestep each; give --act_ranges timestep"):
        load_checkpoint(wrap(**{**W4A8, "act_ranges": "shared"}), tmp_path / "native")
    with pytest.raises(UserError, match="the same for all timesteps; give --act_ranges shared"):
        load_checkpoint(wrap(**W4A8), tmp_path / "shared")
    with pytest.raises(UserError, match="--act_ranges timestep cannot be written as ONNX"):
        check_exportable(qnn.config)
    for name in ("native", "shared", "published"):  # weights can be taken from any
        load_checkpoint(wrap(**W4A8), tmp_path / name, activations=False)
    with pytest.raises(UserError, match="timestep -900"):
        output(qnn, (data.inputs[0], data.inputs[1] - 1400 * (data.inputs[1] == 500)))
    for config, words in (
        ({"act_bits": None}, "--act_ranges timestep needs quantized activations"),
        ({"act_dynamic": True}, "contradicts --quant_mode dynamic"),
        ({"modulate": True}, "contradicts --modulate"),
        ({"act_ranges": "layer"}, "give it one of shared, timestep"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            QuantConfig(**{**W4A8, **config})
        assert "\n" not in str(caught.value)


def test_the_config_is_what_it_was_without_them():
    assert "act_ranges" not in QuantConfig(4, 8).to_dict()
    config = QuantConfig(4, 8, act_ranges="timestep", keep_ends=True)
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert config.of_layer("last", ("first", "last")).act_bits is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "qdiff", "eda-dm"])
def test_a_calibration_continues(method, wrap, data, tmp_path):
    whole = made(wrap, data, method)

    def stops(count, phase, index):
        return index == 3 and phase in ("gptq", "activations", "joint")

    stopped, journal = StoppedJournal(tmp_path, stops), ResumedJournal(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        made(wrap, data, method, run=quiet(journal=stopped))
    resumed = made(wrap, data, method, run=quiet(journal=journal))
    assert journal.restored == stopped.count
    assert same(tables(resumed), tables(whole))
    assert torch.equal(output(resumed, data.inputs), output(whole, data.inputs))


@pytest.mark.slow
def test_weights_are_learned_and_ranges_are_not(wrap, data):
    observed = tables(made(wrap, data, "qdiff"))
    short = replace(METHODS["qdiff"], act_iterations=9)
    qnn, run = wrap(**W4A8), quiet()
    calibrate(qnn, data, "qdiff", short, run=run)
    assert same(tables(qnn), observed)
    assert all(run.errors[f"activations {name}"] > 0 for name in ("conv_in", "block"))
    assert not any(q.delta.requires_grad for q in qnn.act_quantizers().values())


def test_layers_one_by_one(wrap, data):
    config = replace(METHODS["qdiff"], unit="layer")
    qnn = wrap(**W4A8)
    calibrate(qnn, data, "qdiff", config, run=quiet())
    assert torch.isfinite(output(qnn, data.inputs)).all()


class Fold(nn.Module):
    """A block whose layer ``rows`` takes two rows per sample, and whose layer ``constant`` takes no samples at all."""

    def __init__(self, samples_first):
        super().__init__()
        self.samples_first, self.rows, self.constant = samples_first, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, h):
        if self.samples_first:
            rows = self.rows(h.repeat_interleave(2, 0)).unflatten(0, (-1, 2)).sum(1)
        else:
            rows = sum(self.rows(h.repeat(2, 1)).chunk(2))
        return rows + self.constant(torch.ones(5, 4).to(h)).sum(0)


class Folding(nn.Module):
    def __init__(self, samples_first):
        super().__init__()
        self.first, self.fold = nn.Linear(4, 4), Fold(samples_first)

    def forward(self, x, t):
        return self.fold(self.first(x.flatten(1) * (1 + t[:, None] / 100))).view_as(x)


def folding(samples_first, **config):
    torch.manual_seed(0)
    inputs = torch.randn(6, 1, 2, 2), torch.tensor([1, 1, 1, 900, 900, 900])
    config = {"weight_bits": 8, "act_bits": 8, "act_ranges": "timestep", **config}
    return QuantModel(Folding(samples_first).eval(), QuantConfig(**config), inputs), CalibrationSet(inputs)


@torch.no_grad()
def test_several_rows_per_sample(relative):
    qnn, data = folding(True)
    calibrate(qnn, data, "linear", run=quiet())
    mixed = output(qnn, data.inputs)
    for half in (slice(0, 3), slice(3, 6)):
        assert relative(mixed[half], output(qnn, tuple(i[half] for i in data.inputs))) < SUMMATION
    assert relative(mixed, qnn(*data.inputs)) < 0.05


def test_rows_in_another_order_are_refused_by_name():
    qnn, data = folding(False)
    with pytest.raises(UserError, match=r"do not follow one another in what fold\.rows takes"):
        calibrate(qnn, data, "linear", run=quiet())


@pytest.mark.slow
@torch.no_grad()
def test_on_a_gpu(tiny, data, cuda, relative, tmp_path):
    qnn, there = tiny(), tiny("cuda")
    calibrate(qnn, data, "linear", run=quiet())
    wanted = output(qnn, data.inputs)
    save_checkpoint(qnn, tmp_path / "native")
    load_checkpoint(there, tmp_path / "native")
    given = tuple(i.to("cuda") for i in data.inputs)
    for integer in (None, False, True):
        if integer is not None:
            there.pack_weights(integer=integer)
        with there.quantized(), cuda.counting() as counts:
            found = there(*given)
        assert counts.waits == []
        assert relative(found.cpu(), wanted) < 0.1 < relative(found.cpu().flip(0), wanted)
    with pytest.raises(UserError, match="timestep 99999"), there.quantized(), there.trajectory():
        there(given[0], given[1] + 99989 * (given[1] == 10))


@pytest.mark.slow
def test_calibrated_on_a_gpu(tiny, data, cuda):
    qnn = tiny("cuda")
    calibrate(qnn, data, "linear", run=quiet())
    assert all(delta.device.type == "cuda" and delta.shape == (3,) for delta, _ in tables(qnn).values())


@pytest.mark.slow
@torch.no_grad()
def test_loaded_packed(tiny, tiny_network, data, tmp_path):
    qnn = tiny()
    calibrate(qnn, data, "linear", run=quiet())
    save_checkpoint(qnn, tmp_path / "native")
    packed = load_packed(tiny_network.to("meta"), tmp_path / "native")
    assert torch.equal(output(packed, data.inputs), output(qnn, data.inputs))
