"""Outputs of the time embedding by timestep: the same bits as without the cache, in every mode, and what is refused."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.deploy.onnx_export import export_onnx
from qdiff.errors import UserError
from qdiff.tracing.temporal_cache import cached_temporal, is_cached, temporal_layers, with_float_temporal

W4A8 = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True}
KINDS = {
    "float": {"weight_bits": None},
    "W4": {"weight_bits": 4},
    "W4A8": W4A8,
    "per timestep": {**W4A8, "act_ranges": "timestep"},
    "dynamic": {**W4A8, "act_dynamic": True, "act_scale_per": "sample"},
}
CLOSE = 1e-12  # relative, in float64: other orders of the same sums


def batch(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 8, 8, generator=generator)


@torch.no_grad()
def both(qnn, calls, timesteps=()):
    """Return the outputs of calls without and with a cache, and the cache."""
    with qnn.quantized():
        expected = [qnn(*call) for call in calls]
        with cached_temporal(qnn, timesteps) as cache:
            return expected, [qnn(*call) for call in calls], cache


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_the_same_bits(kind, calibrated):
    qnn = calibrated(**KINDS[kind])
    calls = [(batch(n), torch.full((n,), t)) for n in (1, 4, 2) for t in (900, 300, 900)]
    calls += [(batch(4, seed=5), torch.tensor(t)) for t in ([900, 300, 300, 0], [0, 1, 2, 900])]  # mixed ones
    expected, found, cache = both(qnn, calls)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert cache.size_bytes > 0 and not is_cached(qnn)
    with torch.no_grad(), qnn.quantized():
        assert torch.equal(qnn(*calls[0]), expected[0])


@torch.no_grad()
def test_against_an_independent_computation(calibrated):
    qnn = calibrated(**W4A8).double()
    t = torch.tensor([7, 7, 640])
    layers = [qnn.model.get_submodule(name) for name in temporal_layers(qnn)]

    def quantized(layer, x):
        (act,) = layer.act_quantizers
        levels = (x / act.delta).round().add(act.zero_point).clamp(0, 2**act.bits - 1)
        (weights,) = layer.weight_quantizers
        weight = weights.delta * (layer.weight_int.double() - weights.zero_point)
        return (levels - act.zero_point) * act.delta @ weight.T + layer.bias

    half = qnn.model.ch // 2
    angles = t.double()[:, None] * 10_000 ** (-torch.arange(half).double() / (half - 1))
    found = [torch.cat([angles.sin(), angles.cos()], dim=1)]
    for layer in layers[:2]:
        found.append(quantized(layer, found[-1] if len(found) == 1 else F.silu(found[-1])))
    expected = [*found[1:], *(quantized(layer, F.silu(found[2])) for layer in layers[2:])]
    with qnn.quantized(), cached_temporal(qnn) as cache:
        cache.begin(qnn.model, (batch(3).double(), t))
        assert len(cache.outputs) == len(layers)
        for layer, output, wanted in zip(layers, cache.outputs, expected, strict=True):
            assert (output - wanted).norm() < CLOSE * wanted.norm()
            assert (output - wanted.roll(1, 0)).norm() > 1e-3 * wanted.norm()  # planted: rows of other timesteps
            assert layer.forward(torch.full_like(output, torch.nan)) is output  # whatever the input
        cache.end()


@torch.no_grad()
def test_a_layer_computes_once_per_timestep_and_number_of_rows(calibrated):
    qnn = calibrated(**W4A8)
    names = temporal_layers(qnn)
    fired = lambda: {q.fired for name in names for q in qnn.model.get_submodule(name).act_quantizers}  # noqa: E731
    with qnn.quantized(), cached_temporal(qnn):
        qnn.reset_fired()
        for t in (5, 6, 5, 6, 5):
            qnn(batch(2), torch.full((2,), t))
        assert fired() == {2}
        qnn(batch(2), torch.tensor([6, 7]))
        assert fired() == {3}
        qnn(batch(3), torch.full((3,), 5))
        assert fired() == {4}
    qnn(batch(2), torch.full((2,), 5))  # in float nothing fires
    assert fired() == {4}


@torch.no_grad()
def test_every_mode_has_a_table_of_its_own(calibrated):
    qnn, call = calibrated(**W4A8), (batch(2), torch.tensor([5, 800]))
    modes = (
        contextlib.nullcontext,
        qnn.quantized,
        lambda: qnn.quantized(activations=False),
        lambda: torch.autocast("cpu", torch.bfloat16),
    )
    expected = []
    for mode in modes:
        with mode():
            expected.append(qnn(*call))
    wide = qnn.double()(call[0].double(), call[1])
    qnn.float()
    with cached_temporal(qnn):
        for _ in range(2):
            for mode, wanted in zip(modes, expected, strict=True):
                with mode():
                    assert torch.equal(qnn(*call), wanted)
        assert torch.equal(qnn.double()(call[0].double(), call[1]), wide)
    assert not torch.equal(expected[0], expected[1])


@torch.no_grad()
def test_a_copy_made_inside_is_independent(calibrated):
    qnn, call = calibrated(**W4A8), (batch(2), torch.tensor([5, 5]))
    with qnn.quantized(), cached_temporal(qnn):
        expected, copied = qnn(*call), copy.deepcopy(qnn)
        for parameter in qnn.parameters():
            parameter.zero_()
    for other in ((batch(2), torch.tensor([6, 6])), call):
        found = copied(*other)
    assert torch.equal(found, expected)
    assert not any(a is b for a, b in zip(qnn.parameters(), copied.parameters(), strict=True))


@torch.no_grad()
def test_saved_inside_and_loaded(calibrated, wrap, tmp_path):
    qnn, call = calibrated(**W4A8), (batch(2), torch.tensor([5, 800]))
    save_checkpoint(qnn, tmp_path / "before.safetensors")
    with qnn.quantized(), cached_temporal(qnn):
        expected = qnn(*call)
        save_checkpoint(qnn, tmp_path / "inside.safetensors")
    before, inside = (load_file(tmp_path / f"{name}.safetensors") for name in ("before", "inside"))
    assert before.keys() == inside.keys() and all(torch.equal(before[key], inside[key]) for key in before)
    loaded = wrap(**W4A8)
    load_checkpoint(loaded, tmp_path / "inside.safetensors")
    assert all(torch.equal(out, expected) for (out,) in both(loaded, [call])[:2])


@pytest.mark.slow
@torch.no_grad()
def test_packed_weights_and_integer_products(calibrated):
    qnn = calibrated(**W4A8)
    qnn.pack_weights(integer=True)
    calls = [(batch(n), torch.full((n,), t)) for n in (1, 3) for t in (900, 300, 900)]
    expected, found, _ = both(qnn, calls)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@torch.no_grad()
def test_layers_called_by_themselves_compute(calibrated):
    qnn = calibrated(**W4A8)
    name = temporal_layers(qnn)[-1]
    layer, x = qnn.model.get_submodule(name), torch.randn(3, 128)
    expected = layer(x)
    with cached_temporal(qnn):
        qnn(batch(3), torch.tensor([5, 5, 5]))
        assert torch.equal(layer(x), expected)
        with pytest.raises(RuntimeError):
            qnn(batch(3)[:, :0], torch.tensor([5, 5, 5]))
        assert torch.equal(layer(x), expected)  # also after a call that failed


@pytest.mark.slow
@torch.no_grad()
def test_on_a_gpu_a_call_does_not_wait(calibrated, cuda):
    qnn, times = calibrated(**W4A8), (900, 300, 0)
    calls = [(batch(1), torch.tensor([300])), (batch(3), torch.tensor(times))]
    expected, _, _ = both(qnn, calls)
    moved = [tuple(part.to("cuda") for part in call) for call in calls]
    qnn.to("cuda")
    with qnn.quantized(), cached_temporal(qnn, times):
        first = [qnn(*call) for call in moved]
        with cuda.counting() as counts:
            found = [qnn(*call) for call in moved]
    assert counts.waits == []
    assert all(
        torch.equal(a.cpu(), b) and torch.equal(c.cpu(), b) for a, b, c in zip(found, expected, first, strict=True)
    )
    with qnn.quantized(), cached_temporal(qnn), cuda.counting() as counts:  # without timesteps it waits, and is right
        assert torch.equal(qnn(*moved[-1]).cpu(), expected[-1])
    assert counts.waits != []
    far = (moved[0][0], torch.tensor([301], device="cuda"))
    not_given = pytest.raises(UserError, match="a timestep that its temporal cache was not given")
    with not_given, qnn.quantized(), cached_temporal(qnn, times):
        assert qnn(*far).isnan().all()
        qnn(*moved[0])


@torch.no_grad()
def test_a_latent_network_with_a_context():
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    torch.manual_seed(0)
    network = UNetModel(
        *(8, 1, 32, 1, 1, (2,)),
        **{"channel_mult": (1, 2), "num_heads": 1, "use_scale_shift_norm": True, "resblock_updown": True},
        **{"use_spatial_transformer": True, "context_dim": 16, "use_checkpoint": True},
    ).eval()
    for parameter in network.parameters():  # some are zero at first
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    calls = [(batch(3), torch.tensor([t, t, 4]), torch.randn(3, 2, 16)) for t in (4, 900, 4)]
    expected = [network(*call) for call in calls]
    with cached_temporal(network):
        assert all(torch.equal(network(*call), wanted) for call, wanted in zip(calls, expected, strict=True))


@pytest.mark.slow
def test_everything_that_depends_on_t_alone_stays_in_float(calibrated, wrap, tmp_path):
    names = temporal_layers(wrap(**W4A8))
    config = with_float_temporal(QuantConfig(**W4A8, layer_bits={"conv_in": "W8"}), wrap(**W4A8))
    qnn = calibrated(**{**W4A8, "layer_bits": config.layer_bits})
    for name, layer in qnn.layers().items():
        assert (len(layer.act_quantizers) == len(layer.weight_quantizers) == 0) == (name in names)
    call = batch(2), torch.tensor([5, 800])
    expected, found, _ = both(qnn, [call])
    assert torch.equal(expected[0], found[0])
    save_checkpoint(qnn, tmp_path / "q.safetensors")
    loaded = wrap(**{**W4A8, "layer_bits": config.layer_bits})
    load_checkpoint(loaded, tmp_path / "q.safetensors")
    assert torch.equal(both(loaded, [call])[1][0], expected[0])
    assert with_float_temporal(config, qnn) == config


@torch.no_grad()
def test_a_modulated_network_with_these_layers_in_float(wrap):
    config = {**W4A8, "act_dynamic": True, "act_scale_per": "sample", "modulate": True}
    qnn = wrap(**{**config, "layer_bits": with_float_temporal(QuantConfig(**config), wrap(**config)).layer_bits})
    for layer in qnn.layers().values():
        if len(layer.weight_quantizers):
            layer.init_weight_ranges(qnn.config.weight_range)
    outputs = []
    for cache in (contextlib.nullcontext, lambda: cached_temporal(qnn)):
        with qnn.quantized(), cache(), qnn.trajectory():
            outputs.append([qnn(batch(2), torch.full((2,), t)) for t in (900, 300)])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_it_ends_with_an_exception_and_is_not_exported(calibrated, tmp_path):
    qnn = calibrated(**W4A8)
    with pytest.raises(UserError, match="looked up by timestep cannot be written as ONNX"), cached_temporal(qnn):
        assert account(qnn, (1, 8, 8)).bops > 0  # its copy does not look up anything
        export_onnx(qnn, tmp_path / "m.onnx", (1, 8, 8))
    assert not is_cached(qnn)


@pytest.mark.slow
def test_refusals(wrap):
    with pytest.raises(UserError, match="temb_proj W8, but --cache_temporal float leaves it in float"):
        with_float_temporal(QuantConfig(**W4A8, layer_bits={"down.0.block.0.temb_proj": "W8"}), wrap(**W4A8))
    dynamic = {**W4A8, "act_dynamic": True}
    for config, message in (
        ({**dynamic, "modulate": True}, "--modulate makes the output of temb.dense.0 depend on the steps before"),
        (dynamic, "with one dynamic range per tensor, the output of temb.dense.0 depends on the whole batch"),
        ({**dynamic, "act_scale_per": "channel"}, "one dynamic range per channel"),
    ):
        with pytest.raises(UserError, match=message), cached_temporal(wrap(**config)):
            pass
        in_float = with_float_temporal(QuantConfig(**config), wrap(**config))
        with cached_temporal(wrap(**{**config, "layer_bits": in_float.layer_bits})):
            pass
    qnn = wrap(**W4A8)
    with cached_temporal(qnn):
        assert is_cached(qnn)
        with pytest.raises(RuntimeError, match="given already"), cached_temporal(qnn):
            pass
    with pytest.raises(UserError, match="not known what Linear computes from the timestep alone"):
        temporal_layers(torch.nn.Linear(2, 2))
