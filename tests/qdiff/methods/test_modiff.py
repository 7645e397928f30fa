"""Ranges of changes on the tiny network: what they are, what learning them gains, and that a calibration resumes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from qdiff.calibration import fitting
from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.run import CalibrationRun, init_weights
from qdiff.calibration.samples import CalibrationSet
from qdiff.errors import UserError
from qdiff.methods import modiff
from qdiff.methods.modiff import ChangesConfig, calibrate_changes
from qdiff.modes import leaf_modes
from qdiff.quantizer import Quantizer

W4A3 = {"weight_bits": 4, "act_bits": 3, "split_shortcut": True, "modulate": True}
LEVELS = 2**3 - 1
STEPS = 18  # of the tiny network
# Relative: a modulated layer's output is a sum over two steps, a plain one's is not.
RANGE_TOLERANCE = 1e-4
# What 30 iterations per layer with larger steps may leave of the error of min-max ranges on unseen pairs; 0.43 to 0.45
# was seen for W8A3.
GAIN = 0.7


def pairs(seed, count=12):
    """Consecutive steps: the second is the first, moved a little."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    t = torch.arange(count) * (900 // count)
    later = 0.95 * x + 0.2 * torch.randn(x.shape, generator=generator)
    return CalibrationSet((torch.stack([x, later], dim=1), torch.stack([t + 50, t], dim=1)))


def quick(**changes):
    """A few iterations with a large step: enough to change every range, not to fit it."""
    return ChangesConfig(**{"iterations": 2, "batch_size": 5, "lr": 1.0, **changes})


def quiet(seed=0, **options):
    return CalibrationRun(seed, show_progress=False, **options)


@pytest.fixture
def rounded(wrap):
    """``rounded(**config)``: the tiny network with its weights rounded to nearest."""

    def made(**config):
        qnn = wrap(**{**W4A3, **config})
        init_weights(qnn)
        return qnn

    return made


@pytest.fixture
def changed(rounded):
    """``changed(settings, run=None, **config)``: the same, with its ranges of changes calibrated."""

    def made(settings, run=None, **config):
        qnn = rounded(**config)
        calibrate_changes(qnn, pairs(1), settings, quiet() if run is None else run)
        return qnn

    return made


def ranges(qnn):
    return {
        name: (float(q.delta), int(q.zero_point), bool(q.initialised))
        for name, q in qnn.calibrated_act_quantizers().items()
    }


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def result(changed, known):
    """``result(**settings)``: the ranges that `quick` settings give, calibrated once for all tests."""

    def made(**settings):
        key = tuple(sorted(settings.items()))
        if key not in known:
            known[key] = ranges(changed(quick(**settings)))
        return known[key]

    return made


@torch.no_grad()
def second_step_error(qnn, data):
    """Mean square against float, of the second step of trajectories."""
    before, now = (tuple(i[:, step] for i in data.inputs) for step in (0, 1))
    wanted = qnn(*now)
    with qnn.quantized(), qnn.trajectory():
        qnn(*before)
        return float((qnn(*now) - wanted).square().mean())


# --- Min-max


@torch.no_grad()
def differences(qnn, data, unit):
    """{layer: difference of its inputs} of a unit's layers, activations quantized in the units before it alone."""
    steps, seen = list(qnn.model.steps()), {}
    names = [step.name for step in steps]
    quantized, rest = steps[: names.index(unit)], steps[names.index(unit) :]
    with contextlib.ExitStack() as stack:
        for name, layer in qnn.layers().items():
            if name == unit or name.startswith(f"{unit}."):
                hook = lambda _, args, out, name=name: seen.setdefault(name, []).append(args[0])  # noqa: E731
                stack.callback(layer.register_forward_hook(hook).remove)
        stack.enter_context(leaf_modes([step.module for step in quantized], weights=True, activations=True))
        stack.enter_context(leaf_modes([step.module for step in rest], weights=True, activations=False))
        stack.enter_context(qnn.trajectory())
        for step in (0, 1):
            qnn(*(i[:, step] for i in data.inputs))
    return {name: now - before for name, (before, now) in seen.items()}


def steps_of(difference, layer):
    """(max − min) / (2^b − 1) of every slice of a layer's input."""
    dim = layer.channel_dim
    extremes = [torch.aminmax(part) for part in difference.split(layer.slices, dim=dim)]
    return [(float(high) - float(low)) / LEVELS for low, high in extremes]


@pytest.mark.slow
def test_first_ranges_are_the_extremes_of_the_differences(changed):
    run, data = quiet(), pairs(1)
    qnn = changed(quick(learn=False), run)
    made, looked_at = ranges(qnn), set()
    for unit in ("temb", "conv_in", "down.0.block.0", "mid.attn_1", "up.0.block.0", "conv_out"):
        units = [s.name for s in qnn.model.steps() if s.name == unit or s.name.startswith(f"{unit}.")]
        for name, difference in (item for u in units for item in differences(qnn, data, u).items()):
            layer = qnn.layers()[name]
            for index, wanted in enumerate(steps_of(difference, layer)):
                assert made[f"{name}.act_quantizers.{index}"][0] == pytest.approx(wanted, rel=RANGE_TOLERANCE), name
                looked_at.add(f"{name}.act_quantizers.{index}")
    assert len(looked_at) > 10 and any(name.endswith(".1") for name in looked_at)
    x = data.inputs[0]
    exact = steps_of(x[:, 1] - x[:, 0], qnn.layers()["conv_in"])
    assert made["conv_in.act_quantizers.0"][0] == pytest.approx(exact[0], rel=1e-6)
    # Planted: of the activations themselves.
    assert made["conv_in.act_quantizers.0"][0] < 0.5 * steps_of(x[:, 1], qnn.layers()["conv_in"])[0]
    assert run.errors == {}  # nothing was learned


@pytest.mark.slow
def test_every_quantizer_is_set_and_split_layers_have_two(changed, rounded):
    assert not any(initialised for *_, initialised in ranges(rounded()).values())
    qnn = changed(quick(learn=False))
    qnn.assert_initialised()
    assert all(q.initialised for q in qnn.modules() if isinstance(q, Quantizer))
    made = ranges(qnn)
    split = [name for name, layer in qnn.layers().items() if len(layer.slices) == 2]
    assert split and all(made[f"{n}.act_quantizers.0"] != made[f"{n}.act_quantizers.1"] for n in split)
    assert len(made) == len(qnn.layers()) + len(split)
    whole = changed(quick(learn=False), split_shortcut=False)
    assert len(ranges(whole)) == len(whole.layers())


@pytest.mark.slow
def test_symmetric_ranges_and_the_least_error(changed, result):
    x = pairs(1).inputs[0]
    largest = float((x[:, 1] - x[:, 0]).abs().max())
    symmetric = ranges(changed(quick(learn=False), act_symmetric=True))
    assert symmetric["conv_in.act_quantizers.0"][:2] == (pytest.approx(largest / 3, rel=1e-6), 4)
    least = ranges(changed(quick(learn=False), act_range="mse"))
    assert least["conv_in.act_quantizers.0"][0] < result(learn=False)["conv_in.act_quantizers.0"][0]


# --- Learning


@pytest.mark.slow
def test_learning_lowers_the_error_of_unseen_second_steps(changed, monkeypatch):
    monkeypatch.setattr(fitting, "MAX_STEP_CHANGE", 0.02)
    held_out = pairs(2, count=64)
    first, learned = (
        second_step_error(changed(quick(iterations=30, batch_size=6, learn=learn), weight_bits=8), held_out)
        for learn in (False, True)
    )
    assert learned < GAIN * first


@pytest.mark.slow
def test_it_learns_step_sizes_alone(changed, rounded, result):
    before, run = rounded(), quiet()
    after = changed(quick(), run)
    for name, layer in after.layers().items():
        assert torch.equal(layer.weight_int, before.layers()[name].weight_int)
        assert torch.equal(layer.weight, before.layers()[name].weight)
    assert not any(p.requires_grad for p in after.parameters())
    assert all(layer.memory is None for layer in after.layers().values())
    assert all(0 <= error < float("inf") for error in run.errors.values()) and len(run.errors) >= len(after.layers())
    # Zero points stay, and no step size moves by more than its share.
    learned, extremes = result(), result(learn=False)
    first = "temb.dense.0.act_quantizers.0"  # fed the same in both
    assert learned[first][1] == extremes[first][1]
    assert 0 < abs(learned[first][0] / extremes[first][0] - 1) < 2 * 2 * fitting.MAX_STEP_CHANGE


@pytest.mark.slow
def test_errors_are_named_by_layer(changed):
    run = quiet()
    qnn = changed(quick(iterations=1), run)
    assert {f"changes {name}" for name in qnn.layers()} <= set(run.errors)


@pytest.mark.slow
def test_same_seed_same_result(changed, result):
    torch.manual_seed(99)  # the global generator has no say
    assert ranges(changed(quick(), quiet(0))) == result() != ranges(changed(quick(), quiet(1)))


@pytest.mark.slow
def test_the_penalty_changes_the_result(result):
    plain, heavy = result(), result(out_penalty=10.0)
    assert set(heavy) == set(plain) and sum(heavy[n] != plain[n] for n in plain) > len(plain) // 4


@pytest.mark.slow
@pytest.mark.parametrize(("call", "learn"), [(0, True), (7, True), (STEPS - 1, True), (7, False)])
def test_interrupted_and_resumed_equals_uninterrupted(call, learn, changed, result, tmp_path, monkeypatch):
    record, kept = CalibrationJournal.record, []

    def killed(journal, phase, index, *unit):
        if len(kept) == call:
            raise KeyboardInterrupt
        kept.append((phase, index))
        record(journal, phase, index, *unit)

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationJournal, "record", killed)
        with pytest.raises(KeyboardInterrupt):
            changed(quick(learn=learn), quiet(journal=CalibrationJournal(tmp_path, {"seed": 0})))
    assert kept == [("changes", index) for index in range(call)]
    wanted = result() if learn else result(learn=False)
    observed, observe = [], modiff.observe_unit
    monkeypatch.setattr(modiff, "observe_unit", lambda unit, *more: observed.append(unit.name) or observe(unit, *more))
    again = changed(quick(learn=learn), quiet(journal=CalibrationJournal(tmp_path, {"seed": 0})))
    assert ranges(again) == wanted
    assert len(observed) == STEPS - call, "finished units were calibrated again"


@pytest.mark.slow
def test_rest_bits_and_kept_ends(changed, result):
    """Dynamic ranges have nothing to calibrate; the last layer's input stays in float."""
    qnn = changed(quick(learn=False), rest_bits=8, keep_ends=True)
    assert "conv_in.act_quantizers.0" in ranges(qnn) and not any(n.startswith("conv_out") for n in ranges(qnn))
    assert not any("first_quantizers" in name or "attn" in name.split(".")[-1] for name in ranges(qnn))
    with torch.no_grad(), qnn.quantized(), qnn.trajectory():
        assert all(torch.isfinite(qnn(*(i[:, step] for i in pairs(2).inputs))).all() for step in (0, 1))
    # What the first step loses is part of the change, so ranges are others.
    assert ranges(qnn)["conv_in.act_quantizers.0"] != result(learn=False)["conv_in.act_quantizers.0"]


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"iterations": 0}, "--cali_iters_a"),
        ({"batch_size": 0}, "--cali_batch_size"),
        ({"lr": 0.0}, "--cali_lr"),
        ({"lr": float("nan")}, "--cali_lr"),
        ({"p": -1.0}, "--cali_p"),
        ({"out_penalty": -0.1}, "--out_penalty"),
        ({"out_penalty": float("nan")}, "--out_penalty"),
        ({"out_penalty": float("inf")}, "--out_penalty"),
    ],
)
def test_numbers_out_of_range_name_the_option(values, option):
    with pytest.raises(UserError, match=option) as caught:
        ChangesConfig(**values)
    assert "\n" not in str(caught.value)
