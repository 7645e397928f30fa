"""Checkpoints: published files give their golden outputs, ours give back what was saved, and misfits are errors."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from golden_cases import FLOAT_TOLERANCE, GoldenCase
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from stored_size import content_bytes, stored_bytes

from ddim.models.diffusion import Model
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.checkpoint.metadata import read_metadata
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.io.tensor_files import load_tensors
from qdiff.quant_model import QuantModel

W4A8 = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split_shortcut": True}

W4A8_SPLIT, W8 = GoldenCase("ddim_w4a8_split"), GoldenCase("ddim_w8_nosplit")
BOTH = pytest.mark.parametrize("golden", [W4A8_SPLIT, W8], ids=lambda g: g.name)


@pytest.fixture
def tiny_config(tiny_config):
    """Two channels a norm group: with one, the norm takes out what the time embedding adds."""
    tiny_config.model.ch = 64
    return tiny_config


def snapshot(qnn):
    return {k: v.clone() for k, v in qnn.state_dict().items()}


def assert_unchanged(qnn, before):
    after = qnn.state_dict()
    assert set(after) == set(before)
    changed = [k for k in before if not torch.equal(after[k], before[k])]
    assert not changed, f"{len(changed)} entries changed, e.g. {changed[0]}"


def refuses(qnn, path, match, **options):
    """The error is one sentence that matches, and nothing has changed after it."""
    before = snapshot(qnn)
    with pytest.raises(UserError, match=match) as caught:
        load_checkpoint(qnn, path, **options)
    assert str(path) in str(caught.value)
    assert_unchanged(qnn, before)


# ---------------------------------------------------------------------- published files in float32


@BOTH
def test_float_weights_of_a_published_file(golden, relative):
    state = load_tensors(golden.path)
    network = golden.network().eval()
    network.load_state_dict({k[len("model.") :]: v for k, v in state.items() if "quantizer" not in k}, strict=True)
    with torch.no_grad():
        assert relative(network(*golden.inputs), golden.values["fp"]) < FLOAT_TOLERANCE
        network.mid.attn_1.v.weight.mul_(1.01)
        assert relative(network(*golden.inputs), golden.values["fp"]) > FLOAT_TOLERANCE


@BOTH
def test_wrapped_float_output_of_a_published_file(golden, relative):
    qnn = golden.wrapped()
    load_checkpoint(qnn, golden.path)
    assert relative(qnn(*golden.inputs), golden.values["fp"]) < FLOAT_TOLERANCE


@BOTH
@pytest.mark.parametrize("options", ["as in the file", "weights asked for alone", "no activation width"])
def test_published_weight_only(golden, options, relative, run_quantized):
    qnn = golden.wrapped(**({"act_bits": None} if options == "no activation width" else {}))
    load_checkpoint(qnn, golden.path, activations=options == "as in the file")
    # A file without activations was resumed once, with weights alone.
    expected = golden.values["resumed_weight_only" if golden.options["act_bits"] else "resumed"]
    assert relative(run_quantized(qnn, golden.inputs, activations=False), expected) < FLOAT_TOLERANCE
    assert relative(run_quantized(qnn, golden.inputs, activations=False), golden.values["fp"]) > FLOAT_TOLERANCE
    with torch.no_grad():
        qnn.model.mid.attn_1.v.weight_quantizers[0].delta.mul_(1.01)
    assert relative(run_quantized(qnn, golden.inputs, activations=False), expected) > FLOAT_TOLERANCE


def test_weights_alone_leave_activation_quantizers_unset():
    qnn = W4A8_SPLIT.wrapped()
    load_checkpoint(qnn, W4A8_SPLIT.path, activations=False)
    with pytest.raises(UserError, match="activation quantizer"), qnn.quantized():
        pass


# ---------------------------------------------------------------------- save and reload


CONFIGS = {
    "w4a8": W4A8,
    "w4a8_asymmetric": {"weight_bits": 4, "act_bits": 8, "softmax_bits": 16},
    "w3_split": {"weight_bits": 3, "split_shortcut": True},
    "w8": {"weight_bits": 8},
    "w5_symmetric": {"weight_bits": 5, "weight_symmetric": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_native_round_trip_is_exact(name, wrap, calibrated, held_out, run_quantized, tmp_path):
    source, target = calibrated(**CONFIGS[name]), wrap(**CONFIGS[name])
    save_checkpoint(source, tmp_path / "q.safetensors", notes={"seed": 3})
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.fill_(0.5)
    load_checkpoint(target, tmp_path / "q.safetensors")
    assert torch.equal(run_quantized(target, held_out), run_quantized(source, held_out))
    assert json.loads(read_metadata(tmp_path / "q.safetensors")["notes"]) == {"seed": 3}


def test_native_keeps_float_weights_where_they_have_no_width(wrap, calibrated, held_out, run_quantized, tmp_path):
    config = {"weight_bits": None, "act_bits": 8}
    source, target = calibrated(**config), wrap(**config)
    save_checkpoint(source, tmp_path / "q.safetensors")
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.fill_(0.5)
    load_checkpoint(target, tmp_path / "q.safetensors")
    assert torch.equal(run_quantized(target, held_out), run_quantized(source, held_out))
    with pytest.raises(UserError, match="--weight_bit"):
        save_checkpoint(source, tmp_path / "q.pth", format="published")


# One symmetric activation case is left out on purpose: see the next test.
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "w4a8"])
def test_published_round_trip_is_exact(name, wrap, calibrated, held_out, run_quantized, tmp_path):
    source, target = calibrated(**CONFIGS[name]), wrap(**CONFIGS[name])
    save_checkpoint(source, tmp_path / "q.pth", format="published")
    load_checkpoint(target, tmp_path / "q.pth")
    assert torch.equal(target(*held_out), source(*held_out)), "the published file holds the float weights"
    for a, b in zip(target.layers().values(), source.layers().values(), strict=True):
        assert torch.equal(a.weight_int, b.weight_int)
    assert torch.equal(run_quantized(target, held_out), run_quantized(source, held_out))


def test_published_symmetric_softmax_is_widened_once(wrap, calibrated, held_out, run_quantized, tmp_path):
    """The published DDIM softmax quantizer is signed under --a_sym: half the levels, everything else exact."""
    source, target, again = calibrated(**W4A8), wrap(**W4A8), wrap(**W4A8)
    save_checkpoint(source, tmp_path / "1.pth", format="published")
    load_checkpoint(target, tmp_path / "1.pth")
    for name, quantizer in source.act_quantizers().items():
        loaded, softmax = target.act_quantizers()[name], name.endswith("_w")
        factor = 255 / 127 if softmax else 1.0
        assert float(loaded.delta) == pytest.approx(float(quantizer.delta) * factor, rel=1e-6)
        assert int(loaded.zero_point) == 128
    save_checkpoint(target, tmp_path / "2.pth", format="published")
    load_checkpoint(again, tmp_path / "2.pth")
    assert torch.equal(run_quantized(again, held_out), run_quantized(target, held_out))


@pytest.mark.parametrize("format", ["native", "published"])
def test_a_published_file_survives_either_format(format, run_quantized, tmp_path):
    golden = W4A8_SPLIT
    source, target = golden.wrapped(), golden.wrapped()
    load_checkpoint(source, golden.path)
    save_checkpoint(source, tmp_path / "again", format=format)
    load_checkpoint(target, tmp_path / "again")
    assert torch.equal(run_quantized(target, golden.inputs), run_quantized(source, golden.inputs))


def test_published_keys_are_those_of_the_published_file(tmp_path):
    source = W4A8_SPLIT.wrapped()
    load_checkpoint(source, W4A8_SPLIT.path)
    save_checkpoint(source, tmp_path / "q.pth", format="published")
    ours, theirs = load_tensors(tmp_path / "q.pth"), load_tensors(W4A8_SPLIT.path)
    assert {k: v.numel() for k, v in ours.items()} == {k: v.numel() for k, v in theirs.items()}


def test_published_needs_the_float_weights_that_were_quantized(wrap, calibrated, tmp_path):
    """A native file does not hold them: α against other weights would be noise."""
    save_checkpoint(calibrated(weight_bits=4), tmp_path / "q.safetensors")
    qnn = wrap(weight_bits=4)
    with torch.no_grad():
        qnn.model.mid.attn_1.q.weight.mul_(-1)
    load_checkpoint(qnn, tmp_path / "q.safetensors")
    with pytest.raises(UserError, match=r"float weights of mid\.attn_1\.q"):
        save_checkpoint(qnn, tmp_path / "q.pth", format="published")
    assert not (tmp_path / "q.pth").exists()
    with torch.no_grad():
        qnn.model.mid.attn_1.q.weight.mul_(-1)
    save_checkpoint(qnn, tmp_path / "q.pth", format="published")


def test_a_native_file_with_activations_serves_weight_only_runs(wrap, calibrated, held_out, run_quantized, tmp_path):
    source = calibrated(**W4A8)
    save_checkpoint(source, tmp_path / "q.safetensors")
    target = wrap(**{**W4A8, "act_bits": None})
    load_checkpoint(target, tmp_path / "q.safetensors")
    assert torch.equal(run_quantized(target, held_out), run_quantized(source, held_out, activations=False))


def test_a_four_bit_file_is_an_eighth_of_float(tmp_path, held_out):
    """Overhead allowed: biases, norms and scales in float32 (counted exactly) and the header."""
    # Wider than the tiny network, where biases and scales would weigh more than in any real one.
    config = copy.deepcopy(W8.case["config"])
    config["model"]["ch"] = 96
    qnn = QuantModel(Model(OmegaConf.create(config)), QuantConfig(weight_bits=4))
    float_bytes = 4 * sum(p.numel() for n, p in qnn.model.named_parameters() if not n.endswith(".delta"))
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)
    path = tmp_path / "q.safetensors"
    save_checkpoint(qnn, path)
    size = path.stat().st_size
    assert 1 / 8 < size / float_bytes < 1 / 8 + 0.02
    assert content_bytes(path) == stored_bytes(qnn) > size


def test_nothing_half_written_is_left_behind(calibrated, tmp_path, monkeypatch):
    qnn = calibrated(weight_bits=4)
    path = tmp_path / "q.pth"
    path.write_text("the file of before")

    def interrupted(_, target):
        Path(target).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(qnn, path, format="published")
    assert path.read_text() == "the file of before"
    assert [p.name for p in tmp_path.iterdir()] == ["q.pth"]


@pytest.mark.parametrize("format", ["native", "published"])
def test_an_uncalibrated_network_is_not_saved(format, wrap, calibrated, tmp_path):
    """Reloaded, it would pass for calibrated and give noise without an error."""
    weights_only = wrap(**W4A8)
    weights_only.load_state_dict(calibrated(**{**W4A8, "act_bits": None}).state_dict(), strict=False)
    for qnn, kind in ((wrap(**W4A8), "weight"), (weights_only, "activation")):
        with pytest.raises(UserError, match=f"{kind} quantizer"):
            save_checkpoint(qnn, tmp_path / "q", format=format)
    assert not list(tmp_path.iterdir())


WRAPPED = {
    "the whole in parallel": lambda n: f"module.{n}",
    "its network": lambda n: n.replace("model.", "model.module.", 1),
    "ranges alone": lambda n: f"module.{n}" if "quantizer" in n else n,
    "compiled": lambda n: f"_orig_mod.{n}",
}


@pytest.mark.parametrize("how", WRAPPED)
@pytest.mark.parametrize("activations", [True, False])
def test_published_names_of_wrapped_networks(activations, how, calibrated, wrap, held_out, run_quantized, tmp_path):
    save_checkpoint(calibrated(**W4A8), tmp_path / "q.pth", format="published")
    state = {WRAPPED[how](name): value for name, value in load_tensors(tmp_path / "q.pth").items()}
    torch.save(state, tmp_path / "wrapped.pth")
    outputs = []
    for name in ("q.pth", "wrapped.pth"):
        qnn = wrap(**W4A8)
        load_checkpoint(qnn, tmp_path / name, activations=activations)
        outputs.append(run_quantized(qnn, held_out, activations=activations))
    assert torch.equal(*outputs)


# ---------------------------------------------------------------------- misfits


@pytest.mark.parametrize(
    ("golden", "changes", "match"),
    [
        (W4A8_SPLIT, {"split_shortcut": False}, "add --split"),
        (W8, {"split_shortcut": True}, "leave --split out"),
        (W4A8_SPLIT, {"weight_bits": 8}, "--weight_bit"),
        (W4A8_SPLIT, {"weight_bits": 5}, "--weight_bit"),
        (W4A8_SPLIT, {"weight_bits": 3}, "--weight_bit"),
        (W4A8_SPLIT, {"weight_bits": 2}, "--weight_bit"),
        (W8, {"weight_bits": 4}, "--weight_bit"),
        (W8, {"weight_bits": None}, "--weight_bit"),
        (W4A8_SPLIT, {"act_symmetric": False}, "add --a_sym"),
        (W8, {"act_bits": 8}, "leave out --quant_act"),
    ],
)
def test_published_misfit_names_the_option(golden, changes, match):
    refuses(golden.wrapped(**changes), golden.path, match)


def test_published_asymmetric_file_under_a_sym(wrap, calibrated, tmp_path):
    save_checkpoint(calibrated(weight_bits=4, act_bits=8), tmp_path / "q.pth", format="published")
    refuses(wrap(weight_bits=4, act_bits=8, act_symmetric=True), tmp_path / "q.pth", "leave --a_sym out")


def test_published_asymmetric_file_of_a_wider_activation(wrap, calibrated, tmp_path):
    save_checkpoint(calibrated(weight_bits=4, act_bits=8), tmp_path / "q.pth", format="published")
    refuses(wrap(weight_bits=4, act_bits=4), tmp_path / "q.pth", "--act_bit")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"weight_bits": 8}, "--weight_bit 4"),
        ({"weight_bits": None}, "--weight_bit 4"),
        ({"act_bits": 6}, "--act_bit 8"),
        ({"act_symmetric": False}, "add --a_sym"),
        ({"softmax_bits": 16}, "--sm_abit 8"),
        ({"split_shortcut": False}, "add --split"),
    ],
)
def test_native_misfit_names_the_option(changes, match, wrap, calibrated, tmp_path):
    save_checkpoint(calibrated(**W4A8), tmp_path / "q.safetensors")
    refuses(wrap(**{**W4A8, **changes}), tmp_path / "q.safetensors", match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [({"split_shortcut": True}, "leave out --split"), ({"act_bits": 8}, "leave out --quant_act")],
)
def test_native_file_with_less_than_asked(changes, match, wrap, calibrated, tmp_path):
    save_checkpoint(calibrated(weight_bits=4), tmp_path / "q.safetensors")
    refuses(wrap(**{"weight_bits": 4, **changes}), tmp_path / "q.safetensors", match)


def test_a_file_of_another_network(wrap, calibrated, tmp_path):
    save_checkpoint(calibrated(weight_bits=8), tmp_path / "q.safetensors")
    refuses(W8.wrapped(), tmp_path / "q.safetensors", "another network")
    refuses(wrap(weight_bits=8), W8.path, "another network")


# ---------------------------------------------------------------------- damaged and foreign files


@pytest.fixture(params=["native", "published"])
def saved(request, calibrated, tmp_path):
    path = tmp_path / "q"
    save_checkpoint(calibrated(weight_bits=4), path, format=request.param)
    return path


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated(saved, share, wrap):
    content = saved.read_bytes()
    saved.write_bytes(content[: math.floor(len(content) * share)])
    refuses(wrap(weight_bits=4), saved, "truncated|empty")


@pytest.mark.parametrize(
    "content",
    [b"\x89PNG\r\n\x1a\n" + bytes(100), b"<html>404</html>", b"PK\x03\x04" + bytes(500), b"\x80\x02" + bytes(50)],
)
def test_foreign(content, wrap, tmp_path):
    (tmp_path / "file").write_bytes(content)
    refuses(wrap(weight_bits=4), tmp_path / "file", "damaged")


def test_foreign_but_readable(wrap, tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    refuses(wrap(weight_bits=4), tmp_path / "a.pth", "not a plain dict of tensors")
    torch.save([1, 2], tmp_path / "b.pth")
    refuses(wrap(weight_bits=4), tmp_path / "b.pth", "not a plain dict of tensors")
    torch.save({"w": torch.zeros(3)}, tmp_path / "c.pth")
    refuses(wrap(weight_bits=4), tmp_path / "c.pth", "another network")
    save_file({"w": torch.zeros(3)}, tmp_path / "d.safetensors")
    refuses(wrap(weight_bits=4), tmp_path / "d.safetensors", "no native quantized checkpoint")


def test_missing_and_folder(wrap, tmp_path):
    refuses(wrap(weight_bits=4), tmp_path / "nowhere.pth", "does not exist")
    refuses(wrap(weight_bits=4), tmp_path, "cannot be read")


class WritesAFile:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').close()",)


@pytest.mark.parametrize(
    "dump", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))], ids=["zip", "pickle"]
)
def test_code_in_a_pickle_is_not_run(dump, wrap, tmp_path):
    evidence = tmp_path / "evidence"
    dump({"model.conv_in.weight": WritesAFile(evidence)}, tmp_path / "evil.pth")
    refuses(wrap(weight_bits=4), tmp_path / "evil.pth", r"not a plain dict of tensors|written by pickle")
    assert not evidence.exists()
    pickle.loads(pickle.dumps(WritesAFile(evidence)))
    assert evidence.exists(), "the planted code does nothing: the test is blind"


@pytest.mark.parametrize("tensor", ["float", "weight_zero_point", "weight"])
@pytest.mark.parametrize("how", ["missing", "short"])
def test_native_with_a_tensor_damaged(tensor, how, wrap, calibrated, tmp_path):
    path = tmp_path / "q.safetensors"
    save_checkpoint(calibrated(weight_bits=4), path)
    metadata, tensors = read_metadata(path), load_file(path)
    value = tensors.pop(tensor)
    if how == "short":
        tensors[tensor] = value[:-1].clone()
    save_file(tensors, path, metadata=metadata)
    refuses(wrap(weight_bits=4), path, "damaged")


@pytest.mark.parametrize("config", ["{", "[]", "7", '{"weight_bits": 99}', '{"weight_range": "median"}', None])
def test_native_with_a_damaged_config(config, wrap, calibrated, tmp_path):
    path = tmp_path / "q.safetensors"
    save_checkpoint(calibrated(weight_bits=4), path)
    metadata = read_metadata(path)
    metadata.pop("config")
    save_file(load_file(path), path, metadata=metadata | ({} if config is None else {"config": config}))
    refuses(wrap(weight_bits=4), path, "damaged")


@pytest.mark.parametrize(
    ("key", "damage"),
    [
        ("conv_in.weight_quantizer.delta", lambda v: v[:-1]),
        ("conv_in.weight_quantizer.delta", lambda v: v * 0),
        ("conv_in.weight_quantizer.delta", lambda v: v * float("nan")),
        ("conv_in.weight_quantizer.alpha", lambda v: v[:, :0]),
        ("conv_out.weight_quantizer.alpha", lambda v: v[:, :5]),
        ("conv_in.weight", lambda v: v[:-1]),
        ("norm_out.bias", lambda v: v[:-1]),
    ],
)
def test_published_with_a_tensor_damaged(key, damage, wrap, calibrated, tmp_path):
    path = tmp_path / "q.pth"
    save_checkpoint(calibrated(weight_bits=4), path, format="published")
    state = load_tensors(path)
    state[f"model.{key}"] = damage(state[f"model.{key}"])
    torch.save(state, path)
    refuses(wrap(weight_bits=4), path, "malformed|another network")


def test_without_alpha_weights_round_to_nearest(wrap, calibrated, tmp_path):
    source, target = calibrated(weight_bits=4), wrap(weight_bits=4)
    save_checkpoint(source, tmp_path / "q.pth", format="published")
    state = {k: v for k, v in load_tensors(tmp_path / "q.pth").items() if not k.endswith(".alpha")}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "nearest.pth")  # and one level down, as Lightning does
    load_checkpoint(target, tmp_path / "nearest.pth")
    for a, b in zip(target.layers().values(), source.layers().values(), strict=True):
        assert torch.equal(a.weight_int, b.weight_int)
