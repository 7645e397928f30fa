"""The folders of pipelines of the diffusers library: configs and weights of their components.

A folder has ``model_index.json``, and one folder per component with its config and, for networks, its weights.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.io.tensor_files import check_state, read_float_tensors
from qdiff.io.tensor_layout import NetworkLayout

INDEX, CONFIG = "model_index.json", "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# The names of attention layers in files from before diffusers 0.17.
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

MakeComponent = Callable[[type, Mapping[str, Any], NetworkLayout, nn.Module, str], nn.Module]
"""Makes diffusers' network from ours, as `component_of` does."""

ReadComponent = Callable[[type, Mapping[str, Any], NetworkLayout, nn.Module, Path], dict[str, Tensor]]
"""Reads the network in a component's folder as the state of ours, as `tensors_of` does."""


def import_diffusers() -> Any:
    """Import diffusers, or raise a `UserError` that says how to install it."""
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f'{error.name or "diffusers"} is not installed; pip install "qdiff[diffusers]"') from None
    return diffusers


def component_names(folder: str | Path) -> dict[str, str]:
    """Return the components of a pipeline folder, name → class, without those that are null.

    Raises:
        UserError: it is not the folder of a pipeline.
    """
    if not (Path(folder) / INDEX).is_file():
        raise UserError(f"{folder} is no pipeline of diffusers (it has no {INDEX}); give a folder of save_pretrained")
    index = read_json(Path(folder) / INDEX)
    listed = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    return {name: value[1] for name, value in listed.items() if len(value) == 2 and value[1] is not None}


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; a `UserError` if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of bytes that are not UTF-8 as well as of bad JSON
        raise UserError(f"{path} is missing or is not JSON; get the pipeline's folder again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; get the pipeline's folder again")
    return value


def require_class(config: Mapping[str, Any], names: Collection[str], origin: str) -> str:
    """Return the class in a component's config; a `UserError` if it is none of ``names``."""
    name = config.get("_class_name")
    if name not in names:
        raise UserError(f"{origin} is the config of a {name}; the networks of the papers are {' or '.join(names)}")
    return name


def defaults_of(kind: type) -> dict[str, Any]:
    """Return the arguments of a class that have a default, with it."""
    signature = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in signature if p.default is not p.empty}


def complete_config(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a class of diffusers, from a config and otherwise its defaults, as JSON values."""
    defaults = defaults_of(kind)
    return json.loads(json.dumps({name: config.get(name, default) for name, default in defaults.items()}))


def check_same_config(theirs: Mapping[str, Any], ours: Mapping[str, Any], free: Collection[str], origin: str) -> None:
    """Raise a `UserError` that names the first argument in which diffusers' network is none that the papers' code has.

    Args:
        theirs, ours: complete configs: as given, and of the papers' network that it was taken for.
        free: arguments that change no output, and those that differ on purpose.
        origin: the name of ``theirs`` in error messages.
    """
    for name, value in theirs.items():
        if name not in free and value != ours[name]:
            raise UserError(
                f"{origin} has {name} {json.dumps(value)}, where a network of the papers has {json.dumps(ours[name])}; "
                "only their architectures can be converted"
            )


def component_of(
    kind: type, config: Mapping[str, Any], layout: NetworkLayout, network: nn.Module, origin: str
) -> nn.Module:
    """Return diffusers' network with the weights of ours, in eval mode; memory is shared where shapes allow it.

    Args:
        kind, config: its class and arguments.
        layout: of ``network``.
        origin: what is converted, for error messages.
    """
    with torch.device("meta"):
        made = kind(**config)
    made.load_state_dict(layout.to_theirs(network.state_dict(), made.state_dict(), origin), assign=True)
    return made.eval()


def tensors_of(
    kind: type, config: Mapping[str, Any], layout: NetworkLayout, network: nn.Module, folder: Path
) -> dict[str, Tensor]:
    """Return the weights in a component's folder as the state of our network, in float32.

    Args:
        kind, config: the component's class and arguments.
        layout: of ``network``, which may be on the meta device.

    Raises:
        UserError: weights are missing or damaged, or belong to another network.
    """
    with torch.device("meta"):
        expected = kind(**config).state_dict()
    state = {_present(name): value.float() for name, value in read_weights(folder).items()}
    check_state(state, expected, folder)
    return layout.to_ours(state, network.state_dict(), str(folder))


def _present(name: str) -> str:
    """Return the name that diffusers has now for a tensor of an older file."""
    parts = name.split(".")
    return ".".join(FORMER_NAMES.get(part, part) for part in parts) if "attentions" in parts else name


def read_weights(folder: Path, names: Collection[str] = WEIGHTS) -> dict[str, Tensor]:
    """Return the tensors in a component's folder, from one file or from several.

    Args:
        names: what the file may be called; several files have an index of that name.

    Raises:
        UserError: there is no such file, or one is missing or damaged.
    """
    for name in names:
        if (folder / name).is_file():
            return read_float_tensors(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
            return {k: v for file in files for k, v in read_float_tensors(folder / file).items()}
    raise UserError(f"{folder} has no weights ({' or '.join(names)}); get the pipeline's folder again")
