"""What depends on t alone as one unit: what it computes, that it is fitted first, and that nothing fits it again."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from stopped_journal import ResumedJournal, StoppedJournal
from thorough import thorough_except

from qdiff.api import calibrate
from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.temporal_unit import NAME, calibration_steps
from qdiff.errors import UserError
from qdiff.methods.eda_dm import EdaDmConfig
from qdiff.methods.gptq import GptqConfig
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.methods.tfmq_dm import TfmqDmConfig, every_timestep

W4A8 = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True}
CLOSE = 1e-12  # relative, in float64: other orders of the same sums
METHODS = {
    "qdiff": QDiffusionConfig(iterations=2, act_iterations=2, batch_size=4, temporal_unit=True),
    "eda-dm": EdaDmConfig(iterations=2, batch_size=4, temporal_unit=True),
    "gptq": GptqConfig(most_rows=16, temporal_unit=True),
    "tfmq-dm": TfmqDmConfig(iterations=2, batch_size=4),
}


def quiet(**kinds):
    return CalibrationRun(show_progress=False, **kinds)


def run_steps(network, inputs):
    state = network.start(*inputs)
    for step in network.steps():
        step(state)
    return state


@pytest.fixture
def latent():
    """A latent UNet that recomputes its blocks, whose embedding scales and shifts, and inputs for it."""
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    torch.manual_seed(0)
    network = UNetModel(
        *(8, 1, 32, 1, 1, (2,)),
        **{"channel_mult": (1, 2), "num_heads": 1, "use_scale_shift_norm": True, "resblock_updown": True},
        use_checkpoint=True,
    ).eval()
    return network, (torch.randn(4, 1, 8, 8), torch.tensor([3, 3, 500, 999]))


@torch.no_grad()
def test_the_view_computes_what_the_network_computes(wrap, data, relative):
    qnn = wrap(**W4A8).double()
    x, t = data.inputs[0].double(), data.inputs[1]
    network = calibration_steps(qnn, (x, t), True)
    names = [step.name for step in network.steps()]
    assert names[0] == NAME and not {"temb.dense.0", "temb.dense.1"} & set(names)
    state = run_steps(network, (x, t))
    assert relative(state["h"], qnn(x, t)) < CLOSE < relative(state["h"].flip(0), qnn(x, t))
    model = qnn.model
    temb = model.temb.dense[1](F.silu(model.temb.dense[0](model.start(x, t)["temb"])))
    blocks = [s.module for s in model.steps() if hasattr(s.module, "temb_proj")]
    assert len(blocks) > 5
    assert relative(state[NAME], torch.cat([b.temb_proj(F.silu(temb)) for b in blocks], dim=1)) < CLOSE


def test_every_layer_is_in_one_unit(wrap, data):
    qnn = wrap(**W4A8)
    units = list(calibration_steps(qnn, data.inputs, True).steps())
    owners = [{m for m in step.module.modules() if m in set(qnn.layers().values())} for step in units]
    assert sum(map(len, owners)) == len(qnn.layers()) == len(set().union(*owners))
    assert {n for n, layer in qnn.layers().items() if layer in owners[0]} == {n for n in qnn.layers() if "temb" in n}
    assert {name for name, m in units[0].module.named_modules() if m in owners[0]} == {
        n for n in qnn.layers() if "temb" in n
    }


def test_a_latent_network_and_its_gradients(latent, relative):
    from qdiff.config import QuantConfig
    from qdiff.quant_model import QuantModel

    network, (x, t) = latent
    qnn, (x, t) = QuantModel(network, QuantConfig(8)).double(), (x.double(), t)
    for p in qnn.parameters():
        if p.dtype == torch.float64:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    view = calibration_steps(qnn, (x, t), True)
    with torch.no_grad():
        assert relative(run_steps(view, (x, t))["h"], qnn(x, t)) < CLOSE
    both = []
    for steps in (view, qnn.model):  # through blocks that would run again in the backward pass
        given = x.clone().requires_grad_(True)
        run_steps(steps, (given, t))["h"].square().sum().backward()
        both.append(given.grad)
    assert relative(*both) < CLOSE < relative(both[0].flip(0), both[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", thorough_except(METHODS, "qdiff", "tfmq-dm"))
def test_it_is_fitted_first_and_once(method, wrap, data, tmp_path, monkeypatch):
    qnn, done = wrap(**W4A8), []

    class Watching(CalibrationJournal):
        def record(self, phase, index, *unit):
            super().record(phase, index, *unit)
            done.append((phase, index, {n: qnn.layers()[n].weight_int.clone() for n in qnn.layers() if "temb" in n}))

    run = quiet(journal=Watching(tmp_path, {}))
    calibrate(qnn, data, method, METHODS[method], run=run)
    _, index, first = done[0]
    assert index == 0 and len(first) > 7
    for _, _, later in done[1:]:
        assert all(torch.equal(later[name], first[name]) for name in first)
    assert any(name.endswith(NAME) for name in run.errors)
    with torch.no_grad(), qnn.quantized():
        wanted = qnn(*data.inputs)
    again = wrap(**W4A8)
    calibrate(again, data, method, METHODS[method], run=quiet(journal=CalibrationJournal(tmp_path, {})))
    with torch.no_grad(), again.quantized():
        assert torch.equal(again(*data.inputs), wanted)
    assert not any("forward" in vars(m) for m in qnn.modules())


@pytest.mark.slow
@pytest.mark.parametrize("units", [1, 4, 9, 13])
def test_it_continues_after_the_temporal_unit_and_after_any_other(units, wrap, data, tmp_path):
    whole, resumed = wrap(**W4A8, act_ranges="timestep"), wrap(**W4A8, act_ranges="timestep")
    calibrate(whole, data, "tfmq-dm", METHODS["tfmq-dm"], run=quiet())
    stopped, journal = StoppedJournal(tmp_path, lambda count, *_: count == units), ResumedJournal(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        calibrate(wrap(**W4A8, act_ranges="timestep"), data, "tfmq-dm", METHODS["tfmq-dm"], run=quiet(journal=stopped))
    calibrate(resumed, data, "tfmq-dm", METHODS["tfmq-dm"], run=quiet(journal=journal))
    assert journal.restored == units
    for name, layer in whole.layers().items():
        assert torch.equal(layer.weight_int, resumed.layers()[name].weight_int)
    for name, quantizer in whole.act_quantizers().items():
        assert torch.equal(quantizer.delta, resumed.act_quantizers()[name].delta)


@pytest.mark.slow
def test_learning_it_brings_its_outputs_closer(wrap, data):
    errors = {}
    for iterations in (1, 300):
        qnn, run = wrap(weight_bits=3), quiet()
        config = TfmqDmConfig(iterations=iterations, batch_size=12)

        class Enough(CalibrationJournal):
            def record(self, *_):
                raise KeyboardInterrupt

        run.journal = Enough("nowhere", {})
        with contextlib.suppress(KeyboardInterrupt):
            calibrate(qnn, data, "tfmq-dm", config, run=run)
        unit = next(iter(calibration_steps(qnn, data.inputs, True).steps()))
        given = qnn.model.start(*data.inputs)["temb"]
        with torch.no_grad():
            target = unit.module(given)
            for layer in qnn.layers().values():
                layer.weights_quantized = True
            errors[iterations] = float((unit.module(given) - target).square().sum())
    assert errors[300] < 0.5 * errors[1]


def test_it_is_refused_where_it_is_not_known():
    from small_network import Small

    from qdiff.config import QuantConfig
    from qdiff.quant_model import QuantModel

    inputs = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    qnn = QuantModel(Small().eval(), QuantConfig(4), inputs)
    with pytest.raises(
        UserError, match="temporal unit of Small is not known; give --no-temporal_unit, or in Python"
    ) as caught:
        calibrate(qnn, CalibrationSet(inputs), "tfmq-dm", run=quiet())
    assert "\n" not in str(caught.value)


def test_every_k_th_timestep_from_the_noisiest_on():
    t = torch.tensor([0, 10, 20, 30, 40]).repeat_interleave(2)
    data = CalibrationSet((torch.arange(10.0).view(10, 1, 1, 1), t))
    assert every_timestep(data, 1) is data
    kept = every_timestep(data, 2)
    assert kept.inputs[1].tolist() == [0, 0, 20, 20, 40, 40]
    assert kept.inputs[0].flatten().tolist() == [0, 1, 4, 5, 8, 9]
    assert every_timestep(data, 3).inputs[1].tolist() == [10, 10, 40, 40]
    with pytest.raises(UserError, match="--tfmq_every at least 1"):
        TfmqDmConfig(every=0)


@pytest.mark.slow
def test_the_published_method_has_a_range_per_timestep(wrap, data):
    qnn = wrap(**W4A8, act_ranges="timestep", act_range="ema", weight_range="mse")
    calibrate(qnn, data, "tfmq-dm", TfmqDmConfig(iterations=2, batch_size=4, every=5), run=quiet())
    assert len(qnn.act_timesteps.values) == 12
    assert all(q.delta.shape == (12,) for q in qnn.act_quantizers().values())
    with torch.no_grad(), qnn.quantized():
        assert torch.isfinite(qnn(*data.inputs)).all()
