"""The Q-Diffusion recipe on the tiny network: better than naive, reproducible, resumable."""

from __future__ import annotations

import pytest
import torch
from thorough import thorough_except

from qdiff.calibration import fitting
from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.observe import observe_unit
from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.walk import Walker
from qdiff.errors import UserError
from qdiff.methods import qdiffusion
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.quantizer import ActQuantizer
from qdiff.weight_forms import WeightForm

W4A8 = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split_shortcut": True}
STEPS = 18  # of the tiny network


def quick(**changes):
    """A few iterations with a large step: enough to change every unit, not to fit it."""
    return QDiffusionConfig(**{"iterations": 6, "act_iterations": 6, "batch_size": 5, "lr_rounding": 0.05, **changes})


def quiet(seed=0, **options):
    return CalibrationRun(seed, show_progress=False, **options)


def result(qnn):
    """All that calibration decides: integers, step sizes, zero points."""
    return {k: v.clone() for k, v in qnn.state_dict().items() if "quantizer" in k or "weight_int" in k}


def same(a, b):
    assert set(a) == set(b)
    return all(torch.equal(a[k], b[k]) for k in a)


# What the recipe must gain over rounding to nearest on unseen inputs; with these iterations it gains about 25 %.
GAIN = 0.9


@pytest.mark.slow
@pytest.mark.parametrize("config", thorough_except([W4A8, {"weight_bits": 3}], W4A8), ids=["w4a8", "w3a32"])
def test_it_beats_the_linear_baseline(config, wrap, calibrated, data, held_out, run_quantized):
    naive, ours = calibrated(**config), wrap(**config)
    run = quiet()
    recipe = QDiffusionConfig(iterations=60, act_iterations=40, batch_size=8, lr_rounding=0.01)
    qdiffusion.calibrate(ours, data, recipe, run)
    expected = ours(*held_out)
    errors = [float((run_quantized(qnn, held_out) - expected).square().mean()) for qnn in (naive, ours)]
    assert errors[1] < GAIN * errors[0]
    phases = 1 + ("act_bits" in config)
    assert len(run.errors) == STEPS * phases and all(0 <= e < float("inf") for e in run.errors.values())


@pytest.mark.slow
def test_same_seed_same_result(wrap, data):
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(results))  # the global generator has no say
        qnn = wrap(**W4A8)
        qdiffusion.calibrate(qnn, data, quick(), quiet(seed))
        results.append(result(qnn))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.slow
def test_both_phases_change_something(wrap, calibrated, data):
    qnn, naive = wrap(**W4A8), result(calibrated(**W4A8))
    qdiffusion.calibrate(qnn, data, quick(range_samples=12), quiet())
    ours = result(qnn)
    for part in ("weight_int", "act_quantizers.0.delta", "act_quantizers.1.delta", "act_quantizer_w.delta"):
        names = [k for k in ours if k.endswith(part)]
        assert names and any(not torch.equal(ours[k], naive[k]) for k in names), part
    assert all(torch.equal(ours[k], naive[k]) for k in ours if "weight_quantizers" in k), (
        "weight ranges are not learned"
    )
    assert not any(p.requires_grad for p in qnn.parameters())


def interrupted_at(monkeypatch, call):
    """Let ``call`` units be fitted; at the next, Ctrl-C comes after its last iteration and before it is kept."""
    original, calls = fitting.optimise, []

    def optimise(*args, **kwargs):
        error = original(*args, **kwargs)
        calls.append(args[0].name)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return error

    monkeypatch.setattr(fitting, "optimise", optimise)
    return calls


@pytest.fixture(scope="module")
def kept():
    """What a test leaves for its other parameters."""
    return {}


@pytest.fixture
def uninterrupted(kept, wrap, data):
    """All that a calibration decides that nothing interrupts, calibrated once."""
    if not kept:
        qnn = wrap(**W4A8)
        qdiffusion.calibrate(qnn, data, quick(), quiet())
        kept.update(result(qnn))
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("call", thorough_except([0, 7, STEPS, STEPS + 9, 2 * STEPS - 1], 7, STEPS + 9))
def test_interrupted_and_resumed_equals_uninterrupted(call, uninterrupted, wrap, data, tmp_path, monkeypatch):
    settings = {"seed": 0}
    first = wrap(**W4A8)
    with monkeypatch.context() as patch:
        interrupted_at(patch, call)
        with pytest.raises(KeyboardInterrupt):
            qdiffusion.calibrate(first, data, quick(), quiet(journal=CalibrationJournal(tmp_path, settings)))
    assert not any(layer.form is WeightForm.SOFT or layer.weights_quantized for layer in first.layers().values())
    assert not any(p.requires_grad for p in first.parameters())
    if call < 2 * STEPS - 1:  # there, all had been fitted and one was not kept
        assert not same(result(first), uninterrupted)

    second = wrap(**W4A8)
    with monkeypatch.context() as patch:
        fitted = interrupted_at(patch, 10**9)
        qdiffusion.calibrate(second, data, quick(), quiet(journal=CalibrationJournal(tmp_path, settings)))
    assert len(fitted) == 2 * STEPS - call, "finished units were fitted again"
    assert same(result(second), uninterrupted)


@pytest.mark.slow
def test_everything_on_disk_gives_the_same(wrap, data, tmp_path):
    results = []
    for storage in (ActivationStorage(), ActivationStorage(0, tmp_path)):
        qnn = wrap(**W4A8)
        qdiffusion.calibrate(qnn, data, quick(), quiet(storage=storage))
        results.append(result(qnn))
        assert storage.peak > 0 and storage.in_ram + storage.on_disk == 0, "activations were not given back"
    assert same(*results)


@pytest.mark.slow
def test_loaded_weights_stay_as_they_are(calibrated, wrap, data):
    """``--resume_w``: activations alone are calibrated."""
    qnn = wrap(**W4A8)
    qnn.load_state_dict(calibrated(**{**W4A8, "act_bits": None}).state_dict(), strict=False)
    before = result(qnn)
    qdiffusion.calibrate(qnn, data, quick(), quiet(weights=False))
    after = result(qnn)
    weights = [k for k in after if "weight" in k]
    assert weights and all(torch.equal(after[k], before[k]) for k in weights)
    assert all(q.initialised for q in qnn.act_quantizers().values())


@pytest.mark.slow
def test_weights_without_a_width_are_left_alone(wrap, data, held_out, run_quantized, relative):
    qnn = wrap(weight_bits=None, act_bits=8)
    qdiffusion.calibrate(qnn, data, quick(), quiet())
    assert 0 < relative(run_quantized(qnn, held_out), qnn(*held_out)) < 0.5


@pytest.mark.slow
def test_layer_by_layer(wrap, data, monkeypatch):
    qnn, block = wrap(**W4A8), wrap(**W4A8)
    fitted = interrupted_at(monkeypatch, 10**9)
    qdiffusion.calibrate(qnn, data, quick(unit="layer", iterations=2, act_iterations=2), quiet())
    leaves = len(qnn.layers()) + sum(n.endswith("_w") for n in qnn.act_quantizers())
    assert len(fitted) == len(qnn.layers()) + leaves
    cores = {n.removesuffix(".act_quantizer_w") for n in qnn.act_quantizers() if n.endswith("_w")}
    assert set(fitted) == {*qnn.layers(), *cores}
    assert fitted[0] == "temb.dense.0" and fitted.index("up.1.block.0.conv1") < fitted.index("up.0.block.0.conv1")
    qdiffusion.calibrate(block, data, quick(iterations=2, act_iterations=2), quiet())
    assert not same(result(qnn), result(block))


@pytest.mark.slow
def test_fisher_objective(wrap, data):
    results = []
    for objective in ("mse", "fisher"):
        qnn = wrap(weight_bits=3)
        qdiffusion.calibrate(qnn, data, quick(objective=objective), quiet())
        results.append(result(qnn))
    assert not same(*results)


def test_fisher_needs_blocks():
    with pytest.raises(UserError, match="--recon_unit block"):
        QDiffusionConfig(objective="fisher", unit="layer")


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"iterations": 0}, "--cali_iters"),
        ({"act_iterations": 0}, "--cali_iters_a"),
        ({"batch_size": 0}, "--cali_batch_size"),
        ({"lr_act": 0.0}, "--cali_lr"),
        ({"p": float("nan")}, "--cali_p"),
    ],
)
def test_numbers_out_of_range_name_the_option(values, option):
    with pytest.raises(UserError, match=option):
        QDiffusionConfig(**values)


def observed_deltas(wrap, data, recipe, monkeypatch):
    """Step sizes right after observing, before they are learned."""
    monkeypatch.setattr("qdiff.calibration.run.fit_unit", lambda *_: 0.0)
    qnn = wrap(**W4A8)
    qdiffusion.calibrate(qnn, data, recipe, quiet())
    return {n: float(q.delta.detach()) for n, q in qnn.act_quantizers().items()}


@pytest.mark.slow
def test_running_statistics_reach_every_quantizer(wrap, data, monkeypatch):
    """Attention's operands too."""
    momenta = {}
    settle = ActQuantizer.settle

    def settled(quantizer):
        momenta.setdefault(quantizer, []).append(quantizer.observer.momentum)
        settle(quantizer)

    monkeypatch.setattr(ActQuantizer, "settle", settled)
    qnn = wrap(**W4A8)
    qdiffusion.calibrate(qnn, data, quick(running_stat=True), quiet())
    assert {q: [0.95] for q in qnn.act_quantizers().values()} == momenta


@pytest.mark.slow
def test_running_statistics_of_softmax_alone(wrap, data, monkeypatch):
    """All others keep the range of the first samples, as without the option."""
    # Three batches make an average.
    monkeypatch.setattr(CalibrationRun, "walker", lambda run, qnn, _: Walker(run.storage, qnn.device, batch_size=4))
    plain = observed_deltas(wrap, data, quick(range_samples=4), monkeypatch)
    running = {"range_samples": 4, "running_stat": True}
    both = observed_deltas(wrap, data, quick(**running, running_stat_softmax_only=True), monkeypatch)
    everything = observed_deltas(wrap, data, quick(**running), monkeypatch)
    assert both["temb.dense.0.act_quantizers.0"] == plain["temb.dense.0.act_quantizers.0"]
    assert both["conv_in.act_quantizers.0"] == plain["conv_in.act_quantizers.0"]
    assert everything["conv_in.act_quantizers.0"] != plain["conv_in.act_quantizers.0"]
    softmax = [n for n in plain if n.endswith("act_quantizer_w")]
    assert softmax and all(both[n] != plain[n] for n in softmax)


@pytest.mark.slow
def test_running_statistics_see_the_samples_shuffled(wrap, data, monkeypatch):
    """Samples are stored by timestep: in that order the average would forget all but the last timesteps."""
    rows_seen = []

    def observe(unit: Unit, walker, method, rows=None, *rest):
        rows_seen.append(rows)
        observe_unit(unit, walker, method, rows, *rest)

    monkeypatch.setattr(qdiffusion, "observe_unit", observe)
    qdiffusion.calibrate(wrap(**W4A8), data, quick(running_stat=True), quiet())
    assert len(rows_seen) == STEPS
    for rows in rows_seen:
        assert sorted(rows.tolist()) == list(range(len(data)))
        assert rows.tolist() != sorted(rows.tolist())


@pytest.mark.slow
def test_step_sizes_stay_positive(wrap, data):
    qnn = wrap(**W4A8)
    qdiffusion.calibrate(qnn, data, quick(iterations=1, lr_act=10.0), quiet())
    assert all(q.delta > 0 for q in qnn.act_quantizers().values())


def test_few_iterations_move_the_rounding_variable_as_far_as_the_papers_many():
    assert QDiffusionConfig().rounding_rate == 1e-3
    short = QDiffusionConfig(iterations=500)
    assert short.rounding_rate * short.iterations == pytest.approx(20_000 * 1e-3)
    assert QDiffusionConfig(iterations=3).rounding_rate == 0.1
    assert QDiffusionConfig(iterations=500, lr_rounding=2e-3).rounding_rate == 2e-3
