"""Float weights: loaded strictly, found in the cache or fetched, and nothing half-fetched is left."""

from __future__ import annotations

import copy
import hashlib
import urllib.request
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ddim import pretrained
from ddim.models.diffusion import Model
from ddim.pretrained import cache_folder, load_float_weights, pretrained_path
from qdiff.errors import UserError

PAYLOAD = bytes(range(256)) * 8192  # 2 MiB: more than one block of the download


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fresh(tiny_config):
    """A network with other weights than `tiny_network`."""
    torch.manual_seed(1)
    return Model(tiny_config)


def equal(a, b) -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items())


# --- Loading


@pytest.mark.parametrize("kind", ["safetensors", "pth", "legacy", "module", "lightning"])
def test_every_format_loads(kind, tiny_network, fresh, tmp_path):
    state, path = tiny_network.state_dict(), tmp_path / "weights"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif kind == "module":  # the released CIFAR-10 file was saved from DataParallel
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    else:
        torch.save({"state_dict": state} if kind == "lightning" else state, path)
    assert not equal(fresh, tiny_network)
    load_float_weights(fresh, path)
    assert equal(fresh, tiny_network)


@pytest.mark.parametrize("length", [120, 128, 136])
def test_safetensors_header_of_any_length_loads(length, tmp_path):
    """The file begins with the header's length: 128 is 0x80, which is also how a pickle begins."""
    layer, other = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    path = tmp_path / "weights.safetensors"
    for padding in range(100):
        save_file(layer.state_dict(), path, metadata={"note": "x" * padding})
        if path.read_bytes()[0] == length:
            break
    assert path.read_bytes()[0] == length
    load_float_weights(other, path)
    assert torch.equal(other.weight, layer.weight)


def foreign(change):
    def make(state):
        change(state)
        return state

    return make


FOREIGN = {
    "lacks one": (foreign(lambda s: s.pop("conv_in.bias")), ("1 tensors missing", "conv_in.bias")),
    "has one more": (foreign(lambda s: s.update(one_more=torch.zeros(1))), ("1 tensors unexpected", "one_more")),
    "has another shape": (
        foreign(lambda s: s.update({"conv_in.bias": torch.zeros(5)})),
        ("1 tensors of another shape", "conv_in.bias"),
    ),
    "is of another network": (lambda s: {"features.0.weight": torch.zeros(3)}, ("missing", "config")),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("what", FOREIGN)
def test_weights_of_another_network_change_nothing(what, suffix, tiny_network, fresh, tmp_path):
    make, words = FOREIGN[what]
    state, path = make(dict(tiny_network.state_dict())), tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    before = copy.deepcopy(fresh)
    with pytest.raises(UserError) as caught:
        load_float_weights(fresh, path)
    assert str(path) in str(caught.value) and all(word in str(caught.value) for word in words)
    assert equal(fresh, before)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("keep", [0, 3, 9, 200, -1])
def test_truncated_files_are_one_sentence(keep, suffix, tiny_network, fresh, tmp_path):
    path = tmp_path / "weights"
    state = dict(tiny_network.state_dict())
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"truncated|empty") as caught:
        load_float_weights(fresh, path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder(fresh, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_float_weights(fresh, tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        load_float_weights(fresh, tmp_path)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_code_in_a_checkpoint_is_not_run(fresh, tmp_path):
    torch.save({"conv_in.weight": Harmful(tmp_path / "harm")}, tmp_path / "weights")
    with pytest.raises(UserError, match="code in files is not run"):
        load_float_weights(fresh, tmp_path / "weights")
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "weights", weights_only=False)  # planted: a loader that trusts the file
    assert (tmp_path / "harm").exists()


# --- Finding and fetching


def entry(tmp_path: Path, served: bytes | None = PAYLOAD, **more):
    """A config whose weights are served by a file URL (none where ``served`` is None)."""
    source = tmp_path / "served" / "model.ckpt"
    source.parent.mkdir(exist_ok=True)
    if served is not None:
        source.write_bytes(served)
    values = {"url": source.as_uri(), "file": "folder/model.ckpt", "md5": hashlib.md5(PAYLOAD).hexdigest(), **more}
    return OmegaConf.create({"pretrained": {k: v for k, v in values.items() if v is not None}})


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_download_goes_into_the_cache_once(cache, tmp_path, monkeypatch):
    config = entry(tmp_path)
    path = pretrained_path(config)
    assert path == cache / "folder" / "model.ckpt" and path.read_bytes() == PAYLOAD
    assert files(cache) == ["folder/model.ckpt"]
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("fetched again"))
    assert pretrained_path(config) == path


def test_wrong_md5_in_the_cache_is_refused(cache, tmp_path):
    path = pretrained_path(entry(tmp_path))
    path.write_bytes(PAYLOAD[:-1])
    with pytest.raises(UserError, match="wrong MD5") as caught:
        pretrained_path(entry(tmp_path))
    assert str(path) in str(caught.value) and "delete it" in str(caught.value)
    assert pretrained_path(entry(tmp_path, md5=None)) == path  # no sum to check against


def test_wrong_md5_of_a_download_leaves_nothing(cache, tmp_path):
    config = entry(tmp_path, served=PAYLOAD[:-1])
    with pytest.raises(UserError, match="wrong MD5") as caught:
        pretrained_path(config)
    assert config.pretrained.url in str(caught.value)
    assert files(cache) == []


@pytest.mark.parametrize(
    "url",
    [None, "https://weights.invalid/model.ckpt", "http://127.0.0.1:9/model.ckpt", "nonsense"],
    ids=["missing file", "no network", "refused", "no URL"],
)
def test_failed_download_says_what_to_do_by_hand(url, cache, tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    config = entry(tmp_path, served=None)
    if url is not None:
        config.pretrained.url = url
    with pytest.raises(UserError) as caught:
        pretrained_path(config)
    message = str(caught.value)
    assert config.pretrained.url in message and str(cache / "folder" / "model.ckpt") in message
    assert "by hand" in message and "--ckpt" in message and "\n" not in message
    assert not cache.exists()


def test_interrupted_download_leaves_nothing(cache, tmp_path, monkeypatch):
    class Interrupted:
        headers: dict[str, str] = {}  # noqa: RUF012
        blocks = iter([b"first block"])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self, _):
            try:
                return next(self.blocks)
            except StopIteration:
                raise ConnectionResetError("connection reset") from None

    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: Interrupted())
    with pytest.raises(UserError, match="connection reset"):
        pretrained_path(entry(tmp_path))
    assert files(cache) == []


def test_unwritable_cache_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="--ckpt"):
        pretrained_path(entry(tmp_path))


def test_bundled_weights_need_no_cache(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "REPOSITORY", tmp_path)
    config = OmegaConf.create({"pretrained": {"file": "models/a.safetensors"}})
    with pytest.raises(UserError, match=r"bundled weights .* are missing"):
        pretrained_path(config)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.safetensors").write_bytes(b"x")
    assert pretrained_path(config) == tmp_path / "models" / "a.safetensors"
    assert not cache.exists()


@pytest.mark.parametrize("config", [{}, {"pretrained": {"extractor": "x"}}])
def test_config_without_weights(config):
    with pytest.raises(UserError, match="--ckpt"):
        pretrained_path(OmegaConf.create(config))


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("QDIFF_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "qdiff"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "qdiff"
    monkeypatch.setenv("QDIFF_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


# --- --model_dir


def test_a_folder_takes_the_place_of_the_cache(cache, tmp_path, monkeypatch):
    config, folder = entry(tmp_path), tmp_path / "models"
    assert pretrained_path(config, folder) == folder / "folder" / "model.ckpt"
    assert files(folder) == ["folder/model.ckpt"] and not cache.exists()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("fetched again"))
    assert pretrained_path(config, str(folder)).read_bytes() == PAYLOAD
    (folder / "folder" / "model.ckpt").write_bytes(PAYLOAD[:-1])
    with pytest.raises(UserError, match="wrong MD5"):
        pretrained_path(config, folder)


def test_bundled_weights_are_found_in_a_folder(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "REPOSITORY", tmp_path / "repository")
    config, folder = OmegaConf.create({"pretrained": {"file": "models/a.safetensors"}}), tmp_path / "models"
    with pytest.raises(UserError, match="--model_dir") as caught:
        pretrained_path(config, folder)
    assert str(folder / "a.safetensors") in str(caught.value) and "\n" not in str(caught.value)
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"x")
    assert pretrained_path(config, folder) == folder / "a.safetensors"
    with pytest.raises(UserError, match="repository"):  # nothing looks there by itself
        pretrained_path(config)


def test_released_weights_that_a_folder_lacks(cache, tmp_path):
    config, folder = entry(tmp_path, served=None), tmp_path / "models"
    with pytest.raises(UserError, match="by hand") as caught:
        pretrained_path(config, folder)
    assert str(folder / "folder" / "model.ckpt") in str(caught.value) and "\n" not in str(caught.value)
    assert not folder.exists() and not cache.exists()
