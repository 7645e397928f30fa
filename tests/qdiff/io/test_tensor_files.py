"""Files of others are read without running their code: Lightning checkpoints, evil pickles, damaged bytes."""

from __future__ import annotations

import builtins
import collections
import enum
import os
import pickle
import random
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qdiff.errors import UserError
from qdiff.io import tensor_files
from qdiff.io.tensor_files import check_state, is_pickle, load_tensors, read_float_tensors, unwrapped

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.0, 2.0]).half()}


def assert_is_state(loaded):
    assert loaded.keys() == STATE.keys()
    assert all(torch.equal(loaded[k], STATE[k]) and loaded[k].dtype == STATE[k].dtype for k in STATE)


@pytest.fixture
def framework():
    """A module that exists only while files are written."""
    module = types.ModuleType("training_framework")

    def define(name, base=object, **members):
        made = type(name, (base,), {"__module__": "training_framework", **members})
        setattr(module, name, made)
        return made

    define("Callback")
    define("Counter", ran=[], __setstate__=lambda self, state: self.ran.append(state))
    define("Attributes", dict)
    define("Ordered", collections.OrderedDict)
    define("Slotted", __slots__=("x",))
    define("Made", __reduce__=lambda self: (module.make, (1, "two")))
    module.make = lambda *arguments: arguments
    module.make.__module__, module.make.__qualname__ = "training_framework", "make"
    module.Kind = enum.Enum("Kind", ["ONE"], module="training_framework")
    sys.modules["training_framework"] = module
    yield module
    sys.modules.pop("training_framework", None)


def lightning_file(path, framework, state=STATE):
    """Write what Lightning writes, with objects of every form that pickle has, and forget the framework."""
    callback, attributes = framework.Callback(), framework.Attributes(lr=0.1, nested=framework.Attributes(a=[1]))
    callback.best, callback.kind = torch.tensor(0.5), framework.Kind.ONE
    counter, slotted = framework.Counter(), framework.Slotted()
    counter.value, slotted.x = 3, 4
    torch.save(
        {
            "epoch": 3,
            "callbacks": {framework.Callback: {"best": callback}, "again": callback},
            "hyper_parameters": attributes,
            "objects": [counter, slotted, framework.Made(), framework.Ordered(b=callback)],
            "state_dict": collections.OrderedDict(state),
        },
        path,
    )
    del sys.modules["training_framework"]


def test_framework_objects_beside_the_weights(framework, tmp_path):
    path = tmp_path / "last.ckpt"
    lightning_file(path, framework)
    with pytest.raises(pickle.UnpicklingError):  # PyTorch alone refuses the file …
        torch.load(path, weights_only=True)
    with pytest.raises(ModuleNotFoundError):  # … or needs the framework
        torch.load(path, weights_only=False)
    assert_is_state(load_tensors(path))
    assert_is_state(read_float_tensors(path))


def test_no_code_of_the_framework_is_run(framework, tmp_path):
    path = tmp_path / "last.ckpt"
    lightning_file(path, framework)
    sys.modules["training_framework"] = framework  # installed, and still not used
    assert_is_state(load_tensors(path))
    assert framework.Counter.ran == []
    torch.load(path, weights_only=False)
    assert framework.Counter.ran == [{"value": 3}], "the file calls nothing: the test is blind"


def test_stand_ins_are_forgotten_afterwards(framework, tmp_path):
    before = set(torch.serialization.get_safe_globals())
    lightning_file(tmp_path / "last.ckpt", framework)
    load_tensors(tmp_path / "last.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before
    (tmp_path / "bad").write_bytes(b"PK\x03\x04" + bytes(50))
    with pytest.raises(UserError):
        load_tensors(tmp_path / "bad")
    assert set(torch.serialization.get_safe_globals()) == before


def test_an_object_among_the_weights_is_refused(framework, tmp_path):
    path = tmp_path / "last.ckpt"
    lightning_file(path, framework, STATE | {"a.extra": framework.Callback()})
    with pytest.raises(UserError, match="not a plain dict of tensors"):
        load_tensors(path)


# ---------------------------------------------------------------------- evil files


class Evil:
    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def evil_things(evidence):
    write = f"open({str(evidence)!r}, 'w').close()"
    yield Evil(exec, write)
    yield Evil(eval, write)
    yield Evil(os.system, f"touch {evidence}")
    yield Evil(os.mkdir, str(evidence))
    yield Evil(builtins.open, str(evidence), "w")
    yield Evil(torch.save, {}, str(evidence))
    yield Evil(getattr, Evil(__import__, "os"), "mkdir")


def all_forms(thing):
    yield thing
    yield {"state_dict": STATE, "callbacks": thing}
    yield {"state_dict": STATE | {"evil": thing}}
    yield {"callbacks": [{1: thing}], "state_dict": STATE}


@pytest.mark.parametrize("number", range(7))
def test_evil_pickles_run_nothing(number, tmp_path):
    evidence, loaded = tmp_path / "evidence", 0
    thing = list(evil_things(evidence))[number]
    for content in all_forms(thing):
        for dump in (torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))):
            path = tmp_path / "evil.ckpt"
            dump(content, path)
            try:
                assert_is_state(load_tensors(path))  # the weights beside it may be had
                loaded += 1
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            assert not evidence.exists()
    if number < 6:
        pickle.loads(pickle.dumps(thing))
        assert evidence.exists(), "the planted code does nothing: the test is blind"
        assert loaded == (0 if number in (2, 3) else 2), "what PyTorch blocks is refused, the rest is inert"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_damage_is_one_sentence(framework, tmp_path):
    """Bytes of the pickle inside the archive are changed at random: a result or a UserError, nothing else."""
    good, bad, source = tmp_path / "good.ckpt", tmp_path / "bad.ckpt", random.Random(0)
    lightning_file(good, framework)
    with zipfile.ZipFile(good) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [n for n in parts if n.endswith("data.pkl")]
    refused = 0
    for _ in range(300):
        content = bytearray(parts[pickled])
        for _ in range(source.choice([1, 1, 4])):
            content[source.randrange(len(content))] = source.randrange(256)
        with zipfile.ZipFile(bad, "w") as archive:
            for name, data in parts.items():
                archive.writestr(name, bytes(content) if name == pickled else data)
        try:
            load_tensors(bad)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


# ---------------------------------------------------------------------- kinds of files


def test_both_kinds_and_mapping(tmp_path, monkeypatch):
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "a.pth")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    kinds = {p.name: is_pickle(p) for p in tmp_path.iterdir()}
    assert kinds == {"a.safetensors": False, "a.pth": True, "old.pth": True}
    for path in tmp_path.iterdir():
        assert_is_state(read_float_tensors(path))
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k["mmap"]) or load(*a, **k))
    monkeypatch.setattr(tensor_files, "MAPPED_FROM", 0)
    assert_is_state(load_tensors(tmp_path / "a.pth"))
    assert_is_state(load_tensors(tmp_path / "old.pth"))  # cannot be mapped
    assert seen == [True, False]
    for name in ("a.pth", "a.safetensors"):  # releasing float weights writes into what was loaded: not into the file
        read_float_tensors(tmp_path / name)["a.weight"].zero_()
        assert_is_state(read_float_tensors(tmp_path / name))
    monkeypatch.undo()
    assert tensor_files.MAPPED_FROM < 1 << 30  # a released model is mapped


def test_states_that_differ():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
    check_state(dict(expected), expected, "path")
    for state, says in (
        ({"a": torch.zeros(2)}, r"path does not hold.*1 tensors missing \(e\.g\. b\)"),
        (expected | {"c": torch.zeros(1)}, r"1 tensors unexpected \(e\.g\. c\)"),
        (expected | {"b": torch.zeros(4)}, r"1 tensors of another shape \(e\.g\. b\)"),
        (expected | {"b": torch.zeros(3, dtype=torch.int64)}, r"1 tensors of another kind of number \(e\.g\. b\)"),
        (expected | {"a": torch.zeros(2, dtype=torch.complex64)}, r"1 tensors of another kind of number \(e\.g\. a\)"),
    ):
        with pytest.raises(UserError, match=says):
            check_state(state, expected, "path")


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_training_code_of_ddim(averaged, wrapped, tmp_path):
    """[model, optimizer, epoch, step], and the averaged weights last where there are some."""
    prefix = "module." if wrapped else ""
    state = {prefix + name: tensor for name, tensor in STATE.items()}
    other = {name: tensor + 1 for name, tensor in state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save([other, optimizer, 5, 100, state] if averaged else [state, optimizer, 5, 100], tmp_path / "ckpt.pth")
    assert_is_state(unwrapped(load_tensors(tmp_path / "ckpt.pth"), STATE))


WRAPPED = {
    "in parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "a part of it": lambda name: name.replace("a.", "a.module."),
    "some names": lambda name: f"module.{name}" if name.endswith("bias") else name,
}


@pytest.mark.parametrize("how", WRAPPED)
def test_names_of_wrapped_networks(how):
    state = {WRAPPED[how](name): tensor for name, tensor in STATE.items()}
    assert state.keys() != STATE.keys()
    assert_is_state(unwrapped(state, STATE))


def test_names_that_are_not_of_a_wrapper_stay():
    own = {"module.a": torch.ones(1), "b.module.c": torch.ones(1)}
    assert unwrapped(own, own).keys() == own.keys()  # a network may have such a part
    twice = {"module.a": torch.ones(1), "a": torch.zeros(1)}
    assert unwrapped(twice, {"a": 0}).keys() == twice.keys()
    assert unwrapped({"modules.a": 0, "my_module.a": 0}, {}).keys() == {"modules.a", "my_module.a"}


# ---------------------------------------------------------------------- intact files of other kinds


def old_format(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("dump", [torch.save, old_format])
def test_numbers_and_objects_beside_the_weights(dump, framework, tmp_path):
    """Of numpy and of a framework that is gone when the file is read, in both formats."""
    callback = framework.Callback()
    callback.best = np.float64(0.5)
    content = {"epoch": np.int64(3), "loss": np.float32(0.25), "history": np.arange(3.0), "callback": callback}
    dump({**content, "kind": framework.Kind.ONE, "state_dict": STATE}, tmp_path / "last.ckpt")
    del sys.modules["training_framework"]
    assert_is_state(load_tensors(tmp_path / "last.ckpt"))


@pytest.mark.parametrize("dump", [torch.save, old_format])
@pytest.mark.parametrize(
    "placed", [lambda m: m, lambda m: {"model": m}, lambda m: {"state_dict": m}, lambda m: [m, {}, 3]]
)
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_whole_module_is_named(placed, dump, tmp_path):
    dump(placed(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())), tmp_path / "model.pt")
    says_of_checkpoint(tmp_path / "model.pt", r"holds a whole nn\.Module, .* torch\.save its state_dict\(\)")


def says_of_checkpoint(path, match):
    with pytest.raises(UserError, match=match) as caught:
        read_float_tensors(path)
    said = str(caught.value)
    assert str(path) in said and "\n" not in said and "weights_only load" not in said and "safe_globals" not in said
    assert "damaged" not in said and "Unpickler" not in said


def test_intact_files_are_not_called_damaged(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pickle.dumps(STATE))
    says_of_checkpoint(path, "written by pickle, not by torch.save")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 3), torch.ones(1, 2)), str(path))
    says_of_checkpoint(path, "is a TorchScript archive")
    np.savez(tmp_path / "file.npz", a=np.ones(3))
    says_of_checkpoint(tmp_path / "file.npz", "a zip archive, but not one of torch.save")
    with tarfile.open(path, "w") as archive:
        archive.add(tmp_path / "file.npz", "storages")
    says_of_checkpoint(path, "is a tar archive")
    for dump in (torch.save, old_format):
        dump({"state_dict": STATE, "made": Evil(os.mkdir, str(tmp_path / "evidence"))}, path)
        says_of_checkpoint(path, "holds objects that only code can make")
    assert not (tmp_path / "evidence").exists()


@pytest.mark.parametrize("kept", [10, 60, 400, -1, -100])
@pytest.mark.parametrize("dump", [torch.save, old_format])
def test_a_cut_file_is_called_damaged_or_truncated(kept, dump, tmp_path):
    dump({"state_dict": {"a": torch.arange(200.0)}, "loss": np.float64(1.0)}, tmp_path / "good")
    (tmp_path / "bad").write_bytes((tmp_path / "good").read_bytes()[:kept])
    with pytest.raises(UserError, match=r"damaged|truncated") as caught:
        load_tensors(tmp_path / "bad")
    assert "\n" not in str(caught.value)
