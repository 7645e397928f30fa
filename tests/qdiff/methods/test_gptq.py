"""GPTQ on a network: everything is set, errors fall, files and the journal keep it; learned methods start from it."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from small_network import Small
from thorough import thorough_except

from qdiff.api import calibrate
from qdiff.calibration import fitting
from qdiff.calibration import run as calibration_run
from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.run import CalibrationRun
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.methods import eda_dm, gptq, qdiffusion
from qdiff.methods.eda_dm import EdaDmConfig
from qdiff.methods.gptq import GptqConfig
from qdiff.methods.ptq4dm import Ptq4dmConfig
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.quant_model import QuantModel
from qdiff.quantizer import Quantizer

W4A8 = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True, "weight_range": "mse"}
WIDTHS = {
    "W4A32": {"act_bits": None},
    "W4A8": {},
    "W4A4": {"act_bits": 4},
    "W32A8": {"weight_bits": None},
    "8-bit ends": {"keep_ends": True},
    "symmetric": {"weight_symmetric": True, "act_symmetric": True},
    "dynamic": {"act_dynamic": True},
}


@pytest.fixture
def wrap(data):
    """``wrap(**config)``: the small network, always with the same float weights, wrapped and not calibrated."""
    torch.manual_seed(0)
    network = Small().eval()

    def wrapped(**config):
        example = tuple(i[:2] for i in data.inputs)
        return QuantModel(copy.deepcopy(network), QuantConfig(**config), example, ends=("conv_in", "conv_out"))

    return wrapped


def quiet(seed=0, **kinds):
    return CalibrationRun(seed, show_progress=False, **kinds)


def made(wrap, data, config=None, run=None, method="gptq", **changes):
    qnn = wrap(**{**W4A8, **changes})
    calibrate(qnn, data, method, config or GptqConfig(), run=run or quiet())
    return qnn


def state(qnn):
    return {name: tensor.clone() for name, tensor in qnn.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", WIDTHS)
def test_everything_is_set_and_fires(name, wrap, data, held_out, run_quantized, relative):
    run = quiet()
    qnn = made(wrap, data, run=run, **WIDTHS[name])
    assert all(m.initialised for m in qnn.modules() if isinstance(m, Quantizer))
    assert qnn.silent_quantizers() == []
    assert not any(layer.weights_quantized or layer.acts_quantized for layer in qnn.layers().values())
    assert run.errors and all(0 <= error < float("inf") for error in run.errors.values())
    assert 0 < relative(run_quantized(qnn, held_out), qnn(*held_out)) < (1 if name == "W4A4" else 0.5)


@pytest.mark.parametrize("target", ["plain", "gptaq", "corrected"])
@pytest.mark.parametrize("name", ["W4A32", "W4A8"])
def test_it_beats_rounding_to_nearest(target, name, wrap, data, held_out, run_quantized, relative):
    config = {**W4A8, "weight_bits": 3, **WIDTHS[name]}
    nearest, ours = wrap(**config), wrap(**config)
    calibrate(nearest, data, "linear", run=quiet())
    calibrate(ours, data, "gptq", GptqConfig(target=target), run=quiet())
    errors = [relative(run_quantized(qnn, held_out), qnn(*held_out)) for qnn in (nearest, ours)]
    assert errors[1] < 0.9 * errors[0]


def test_the_float_network_stays_what_it_was(wrap, data, held_out):
    with torch.no_grad():
        expected = wrap(**W4A8)(*held_out)
        assert torch.equal(made(wrap, data)(*held_out), expected)


@pytest.mark.slow
def test_options_reach_the_result(wrap, data):
    default = state(made(wrap, data))
    assert same(default, state(made(wrap, data)))
    for config in (
        GptqConfig(target="plain"),
        GptqConfig(factor=0.3),
        GptqConfig(damping=0.5),
        GptqConfig(most_rows=40),
        GptqConfig(bias_correction=False),
    ):
        assert not same(default, state(made(wrap, data, config)))


@pytest.mark.slow
def test_batches_do_not_matter(wrap, data):
    class InFives(CalibrationRun):
        def walker(self, qnn, inputs):
            walker = super().walker(qnn, inputs)
            return type(walker)(walker.storage, walker.device, 5)

    states = []
    for run in (quiet(), InFives(show_progress=False)):
        qnn = wrap(**W4A8).double()
        doubled = type(data)(tuple(i.double() if i.is_floating_point() else i for i in data.inputs))
        calibrate(qnn, doubled, "gptq", GptqConfig(most_rows=200), run=run)
        states.append(state(qnn))
    for name, tensor in states[0].items():
        assert torch.allclose(tensor.double(), states[1][name].double(), rtol=1e-9, atol=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize("unit", [0, 3])
def test_interrupted_and_resumed_equals_uninterrupted(unit, wrap, data, tmp_path, monkeypatch):
    uninterrupted, original, count = quiet(), calibration_run.OpenUnit.measure, []
    whole = state(made(wrap, data, run=uninterrupted))

    def measure(opened, objective):
        count.append(opened.unit.name)
        if len(count) == unit + 1:
            raise KeyboardInterrupt
        original(opened, objective)

    monkeypatch.setattr(calibration_run.OpenUnit, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        made(wrap, data, run=quiet(journal=CalibrationJournal(tmp_path, {"seed": 0})))
    run = quiet(journal=CalibrationJournal(tmp_path, {"seed": 0}))
    assert same(state(made(wrap, data, run=run)), whole)
    assert len(count) == len(uninterrupted.errors) + 1, "finished units were rounded again"
    assert run.errors == uninterrupted.errors


@pytest.mark.parametrize("format", ["native", "published"])
@pytest.mark.parametrize("name", ["W4A32", "W4A8"])
def test_saved_and_loaded(format, name, wrap, data, held_out, run_quantized, tmp_path):
    qnn = made(wrap, data, **WIDTHS[name])
    save_checkpoint(qnn, tmp_path / "q", format)
    loaded = wrap(**{**W4A8, **WIDTHS[name]})
    in_float = loaded(*held_out)
    load_checkpoint(loaded, tmp_path / "q")
    for layer, other in zip(qnn.layers().values(), loaded.layers().values(), strict=True):
        assert torch.equal(layer.weight_int, other.weight_int) and torch.equal(layer.bias, other.bias)
    assert torch.equal(run_quantized(loaded, held_out), run_quantized(qnn, held_out))
    if format == "native":  # a published file holds no second bias
        assert torch.equal(loaded(*held_out), in_float)


def test_a_published_file_of_other_float_weights_is_an_error(wrap, data, tmp_path):
    qnn = made(wrap, data)
    with torch.no_grad():
        for layer in qnn.layers().values():
            layer.weight.copy_(torch.randn_like(layer.weight) * layer.weight.std())
    with pytest.raises(UserError, match="are not those that were quantized"):
        save_checkpoint(qnn, tmp_path / "q", "published")


def test_loaded_weights_stay_as_they_are(wrap, data):
    """``--resume_w``: activations alone are calibrated."""
    source = made(wrap, data, act_bits=None)
    qnn = wrap(**W4A8)
    qnn.load_state_dict(source.state_dict(), strict=False)
    made_run = quiet(weights=False)
    gptq.calibrate(qnn, data, GptqConfig(), made_run)
    for layer, other in zip(qnn.layers().values(), source.layers().values(), strict=True):
        assert torch.equal(layer.weight_int, other.weight_int)
    assert all(q.initialised for q in qnn.act_quantizers().values())


def test_an_activation_range_comes_from_the_rounded_layers_before_it(wrap, data):
    """The last layer's input range is that of the network as quantized up to it."""
    qnn, seen = made(wrap, data, act_range="max"), []
    last = qnn.layers()["conv_out"]
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), qnn.quantized():
        qnn(*data.inputs)
    quantizer = last.act_quantizers[0]
    low, high = -quantizer.zero_point * quantizer.delta, (255 - quantizer.zero_point) * quantizer.delta
    assert abs(float(low - seen[0].min())) < quantizer.delta and abs(float(high - seen[0].max())) < quantizer.delta


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("qdiff", QDiffusionConfig(3, 2, 4, start="gptq", bias_correction=True)),
        ("qdiff", QDiffusionConfig(3, 2, 4, start="gptq", unit="layer")),
        ("eda-dm", EdaDmConfig(iterations=3, batch_size=4, lr_rounding=1e-4, start="gptq", bias_correction=True)),
        ("ptq4dm", Ptq4dmConfig(iterations=3, batch_size=4, lr_rounding=1e-4, start="gptq")),
    ],
)
def test_learned_methods_start_from_it(method, config, wrap, data, held_out, run_quantized, relative):
    started = made(wrap, data, config, method=method)
    nearest = wrap(**W4A8)
    for layer in nearest.layers().values():
        layer.init_weight_ranges("mse")
    moved = [
        not torch.equal(a.weight_int, b.weight_int)
        for a, b in zip(started.layers().values(), nearest.layers().values(), strict=True)
    ]
    assert sum(moved) > len(moved) / 2
    assert (any(layer.float_bias is not None for layer in started.layers().values())) == config.bias_correction
    assert 0 < relative(run_quantized(started, held_out), started(*held_out)) < 0.5


STARTS = {"gptq": "corrected", "gptaq": "gptaq", "plain-gptq": "plain"}


@pytest.mark.parametrize("method", thorough_except(("qdiff", "eda-dm"), "qdiff"))
@pytest.mark.parametrize("start", thorough_except(STARTS, "gptaq"))
def test_without_iterations_worth_the_name_the_start_remains(start, method, wrap, data):
    """At a rate of almost 0, hardening gives back the integers of GPTQ on blocks with activations in float."""
    config = {
        "qdiff": QDiffusionConfig(1, 1, 4, lr_rounding=1e-12, start=start),
        "eda-dm": EdaDmConfig(iterations=1, batch_size=4, lr_rounding=1e-12, start=start),
    }[method]
    integers = made(wrap, data, config, method=method, act_bits=None)
    for target in STARTS.values():
        expected = made(wrap, data, GptqConfig(target=target, bias_correction=False), act_bits=None)
        pairs = zip(integers.layers().values(), expected.layers().values(), strict=True)
        equal = [torch.equal(layer.weight_int, other.weight_int) for layer, other in pairs]
        assert all(equal) if target == STARTS[start] else not all(equal)


LEARNED = {
    "qdiff": QDiffusionConfig(3, 2, 4, start="gptq", bias_correction=True),
    "layers": QDiffusionConfig(2, 2, 4, start="gptq", unit="layer"),
    "eda-dm": EdaDmConfig(iterations=3, batch_size=4, lr_rounding=1e-4, start="gptq", bias_correction=True),
}


def heard(module, name, stop, patch):
    """Note the units that a function of a module is called for; at call ``stop``, Ctrl-C comes after its work."""
    original, units = getattr(module, name), []

    def call(unit, *rest, **named):
        found = original(unit, *rest, **named)
        units.append(unit.name)
        if len(units) == stop:
            raise KeyboardInterrupt
        return found

    patch.setattr(module, name, call)
    return units


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "place", "stop"),
    [
        ("qdiff", "rounded", 4),  # columns are rounded, and nothing is learned from them
        ("qdiff", "learned", 4),  # learned, and not kept
        ("qdiff", "learned", 13),  # the second phase, on biases that were corrected in the first
        ("layers", "learned", 4),  # the second layer of a unit
        ("eda-dm", "rounded", 4),
        ("eda-dm", "learned", 4),
    ],
)
def test_learning_from_it_resumes_where_it_was(name, place, stop, wrap, data, tmp_path, monkeypatch):
    method, config = "eda-dm" if name == "eda-dm" else "qdiff", LEARNED[name]
    module = qdiffusion if method == "qdiff" else eda_dm
    places = {"rounded": (module, "round_layers"), "learned": (fitting, "optimise")}
    runs = [quiet(), *(quiet(journal=CalibrationJournal(tmp_path, {})) for _ in range(2))]
    results, units = [], []
    for run, last in zip(runs, (None, stop, None), strict=True):
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            units.append({p: heard(*where, last if p == place else None, patch) for p, where in places.items()})
            results.append(state(made(wrap, data, config, run, method)))
    assert len(results) == 2 and same(*results)
    whole, first, second = units
    assert first[place] == whole[place][:stop]
    for each in places:  # again is only what the interrupted unit had come to
        assert second[each] == whole[each][len(whole[each]) - len(second[each]) :]
    left = len(whole[place]) - stop
    assert left < len(second[place]) <= left + (2 if name == "layers" else 1)
    assert runs[2].errors.items() <= runs[0].errors.items()


@pytest.mark.slow
def test_on_the_virtual_gpu(cuda, wrap, data):
    """Moments and factors are where the network is; second moments in float32 sum in another order there."""
    on_cpu = made(wrap, data)
    given = tuple(i.to("cuda") for i in data.inputs)
    qnn = QuantModel(Small().eval().to("cuda"), QuantConfig(**W4A8), tuple(i[:2] for i in given))
    qnn.load_state_dict(wrap(**W4A8).state_dict(), strict=False)  # attention is not found there
    calibrate(qnn, data, "gptq", run=quiet())
    assert all(tensor.device.type == "cuda" for tensor in qnn.state_dict().values())
    pairs = zip(qnn.layers().values(), on_cpu.layers().values(), strict=True)
    equal = torch.cat([(a.weight_int.cpu() == b.weight_int).flatten() for a, b in pairs])
    assert equal.double().mean() > 0.9  # integers of unrelated roundings agree in half of the places at most


def test_the_recipes_are_off_by_default():
    for config in (QDiffusionConfig(), EdaDmConfig(), Ptq4dmConfig()):
        assert config.start == "nearest" and not config.bias_correction and not config.rounds_columns
    assert qdiffusion.QDiffusionConfig(start="gptq").rounds_columns and GptqConfig().rounds_columns
