"""Checkpoints that do not fit, are damaged or are none: one sentence, and a network that has not changed."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from golden_cases import GoldenCase
from safetensors.torch import load_file, save_file

from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.checkpoint.metadata import read_metadata
from qdiff.errors import UserError
from qdiff.io.tensor_files import load_tensors

W4A8 = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split_shortcut": True}

W4A8_SPLIT, W8 = GoldenCase("ddim_w4a8_split"), GoldenCase("ddim_w8_nosplit")


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


@pytest.mark.slow
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
