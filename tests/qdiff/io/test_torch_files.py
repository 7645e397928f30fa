"""Writing ``torch.save`` files: equal tensors are equal bytes, whichever process writes them and wherever."""

from __future__ import annotations

import os

import pytest
import torch

from qdiff.io.files import sha256
from qdiff.io.torch_files import read_torch_file, write_torch_file


@pytest.mark.parametrize("name", ["one.pt", "other.pth"])
def test_the_bytes_depend_on_the_values_alone(name, tmp_path, monkeypatch):
    values = {"xs": [torch.arange(6.0)], "ts": [torch.tensor([3])]}
    write_torch_file(values, tmp_path / "one.pt")
    first = sha256(tmp_path / "one.pt")
    monkeypatch.setattr(os, "getpid", lambda: 10**9)
    write_torch_file(values, tmp_path / name)
    assert sha256(tmp_path / name) == first
    write_torch_file({**values, "ts": [torch.tensor([4])]}, tmp_path / name)
    assert sha256(tmp_path / name) != first


def test_it_is_read_again(tmp_path):
    write_torch_file({"xs": [torch.arange(6.0)]}, tmp_path / "new" / "file.pt")
    assert torch.equal(read_torch_file(tmp_path / "new" / "file.pt")["xs"][0], torch.arange(6.0))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.pt"]
