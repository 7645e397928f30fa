"""Pipeline folders of diffusers: what is in them, and what is refused, each in one sentence."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qdiff.errors import UserError
from qdiff.io.diffusers_files import (
    check_same_config,
    complete_config,
    component_names,
    import_diffusers,
    read_weights,
    require_class,
    tensors_of,
)
from qdiff.io.tensor_layout import layout_of

NAME = "diffusion_pytorch_model.safetensors"


class Theirs(nn.Module):
    def __init__(self, width: int = 2, shape: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([nn.Module()])
        self.attentions[0].to_q = nn.Linear(width, width)


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Conv2d(2, 2, 1)


def index(folder, components: dict) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "P", **components}))


def test_components(tmp_path):
    parts = {"unet": ["diffusers", "UNet2DModel"], "safety_checker": [None, None], "requires_safety_checker": False}
    index(tmp_path, parts)
    assert component_names(tmp_path) == {"unet": "UNet2DModel"}
    with pytest.raises(UserError, match=r"unet is no pipeline of diffusers \(it has no model_index\.json\); give"):
        component_names(tmp_path / "unet")
    for text in ("{", "[1]", "\ud800"):
        (tmp_path / "model_index.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError, match=r"model_index\.json is (missing or is not JSON|not a JSON object); get"):
            component_names(tmp_path)


def test_classes_and_arguments():
    assert require_class({"_class_name": "A"}, ("A", "B"), "x") == "A"
    with pytest.raises(UserError, match="x is the config of a C; the networks of the papers are A or B"):
        require_class({"_class_name": "C"}, ("A", "B"), "x")
    complete = complete_config(Theirs, {"width": 3, "_class_name": "Theirs"})
    assert complete == {"width": 3, "shape": [1, 2]}
    check_same_config(complete, complete_config(Theirs, {}), ("width",), "x")
    with pytest.raises(UserError, match=r"x has width 3, where a network of the papers has 2; only"):
        check_same_config(complete, complete_config(Theirs, {}), (), "x")


def test_weights_in_one_file_and_in_several(tmp_path):
    parts = {"a": torch.ones(2), "b": torch.zeros(1)}
    with pytest.raises(UserError, match=r"has no weights .*; get the pipeline's folder again"):
        read_weights(tmp_path)
    for name, value in parts.items():
        save_file({name: value}, tmp_path / f"{name}.safetensors")
    (tmp_path / f"{NAME}.index.json").write_text(json.dumps({"weight_map": {n: f"{n}.safetensors" for n in parts}}))
    assert read_weights(tmp_path).keys() == parts.keys()
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors does not exist"):
        read_weights(tmp_path)
    save_file({"c": torch.ones(1)}, tmp_path / NAME)
    assert read_weights(tmp_path).keys() == {"c"}
    (tmp_path / NAME).unlink()
    torch.save({"d": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / f"{NAME}.index.json").unlink()
    assert read_weights(tmp_path).keys() == {"d"}


def test_tensors_of_a_component(tmp_path):
    """Also in half precision, and under the names that attention layers once had."""
    ours, layout = Ours(), layout_of(Ours(), [("q", "attentions.0.to_q")], {})
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for name in ("to_q", "query"):
        state = {f"attentions.0.{name}.weight": weight.half(), f"attentions.0.{name}.bias": torch.zeros(2)}
        save_file(state, tmp_path / NAME)
        made = tensors_of(Theirs, {}, layout, ours, tmp_path)
        assert made["q.weight"].dtype == torch.float32 and torch.equal(made["q.weight"][:, :, 0, 0], weight)
    save_file({"attentions.0.to_q.weight": weight}, tmp_path / NAME)
    with pytest.raises(UserError, match=r"1 tensors missing \(e\.g\. attentions\.0\.to_q\.bias\)"):
        tensors_of(Theirs, {}, layout, ours, tmp_path)
    save_file({**state, "more": weight}, tmp_path / NAME)
    with pytest.raises(UserError, match=r"1 tensors unexpected \(e\.g\. more\)"):
        tensors_of(Theirs, {}, layout, ours, tmp_path)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r'diffusers is not installed; pip install "qdiff\[diffusers\]"'):
        import_diffusers()
