"""Run an exported network with ONNX Runtime or OpenVINO, in place of the torch network."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qdiff.config import QuantConfig
from qdiff.deploy.exactness import check_exact
from qdiff.deploy.onnx_export import FORMAT, METADATA, first_step_path, import_onnx, metadata_of
from qdiff.deploy.onnx_graph import INPUTS, STATE
from qdiff.deploy.onnx_lowering import ProductLimits, lower
from qdiff.deploy.runtime import OnnxRuntime
from qdiff.deploy.runtimes import RUNTIMES
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel
from qdiff.ranges.first_token import ANOTHER

if TYPE_CHECKING:
    import onnx

# Not compared: the way in which ranges were chosen, because the ranges themselves are compared.
HOW_CHOSEN = ("weight_range", "act_range")


class OnnxNetwork:
    """ε(x, t[, context]) computed by a runtime on the CPU; the result is returned on the device of the inputs.

    Args:
        path: a file written by `qdiff.deploy.onnx_export.export_onnx`.
        runtime: name in `qdiff.deploy.runtimes.RUNTIMES` of a runtime that runs exported models.
        threads: number of threads; None takes torch's number.
        qnn: the network that the file must have been exported from; None accepts any.
        shapes: (C, H, W) of the images and (L, D) of the context that the file must have; () accepts any.

    Raises:
        UserError: the runtime is not installed, or the file is damaged, was not written by this project, or belongs to
            another network.
    """

    def __init__(
        self,
        path: str | Path,
        runtime: str,
        threads: int | None = None,
        qnn: QuantModel | None = None,
        shapes: tuple[tuple[int, ...] | None, ...] = (),
    ) -> None:
        path, threads, self._runtime = Path(path), threads or torch.get_num_threads(), runtime
        model = read_model(path)
        if qnn is not None:
            check_config(path, model, qnn.config)
            _check_content(path, properties(model), metadata_of(qnn, {}))
        _check_shapes(path, model, shapes)
        first, self._first = first_step_path(path), None
        if any(each.name.startswith(f"{STATE}.") for each in model.graph.input):
            earlier = read_model(first)
            _check_content(first, properties(earlier), properties(model))
            self._first = _Graph(earlier, RUNTIMES[runtime], threads)
        self._graph = _Graph(model, RUNTIMES[runtime], threads)
        self._state: dict[str, np.ndarray] | None = None
        self._bos_aware = _config_of(model).bos_aware

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        given = [i for i in inputs if i is not None]
        feed = {name: i.detach().to("cpu", torch.float32).numpy() for name, i in zip(INPUTS, given, strict=False)}
        graph = self._graph
        if self._first is not None:
            feed |= self._remembered(len(given[0]))
            graph = self._graph if self._state else self._first
        eps, *state = graph.run(feed)
        if eps.size == 0:  # OpenVINO did so on a CPU whose instructions were emulated; nothing says why
            raise UserError(
                f"{self._runtime} returns an empty output on this CPU; give another --runtime, e.g. simulated"
            )
        if self._bos_aware and not np.isfinite(eps).all():
            raise UserError(ANOTHER)  # so the graph says
        if self._first is not None:
            self._state = dict(zip(self._graph.states, state, strict=True))
        return torch.from_numpy(eps).to(given[0].device)

    def _remembered(self, batch: int) -> dict[str, np.ndarray]:
        if self._state is None:
            raise RuntimeError(
                "a modulated network needs a trajectory; open `with network.trajectory():` once per batch"
            )
        there = len(next(iter(self._state.values()), range(batch)))
        if there != batch:
            raise RuntimeError(
                f"got a batch of {batch} in a trajectory of {there}; open a new trajectory for a new batch"
            )
        return self._state

    @contextlib.contextmanager
    def trajectory(self) -> Iterator[None]:
        """Sample one batch inside the block; the state of modulated layers is dropped at its end."""
        self._state = {}
        try:
            yield
        finally:
            self._state = None


class _Graph:
    """One model in a runtime; ``states`` names the state inputs, in the order in which the model returns them."""

    def __init__(self, model: onnx.ModelProto, runtime: OnnxRuntime, threads: int) -> None:
        limits = ProductLimits()
        if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            limits = check_exact(runtime)
        lower(model, runtime.changes(limits))
        self.states = [each.name for each in model.graph.input if each.name.startswith(f"{STATE}.")]
        self.run = runtime.open(model, threads)


def read_model(path: Path) -> onnx.ModelProto:
    """Read an exported model.

    Raises:
        UserError: the file is missing, damaged, or not written by `export_onnx`.
    """
    onnx = import_onnx()
    if not path.is_file():
        raise UserError(f"ONNX file {path} does not exist; write it with scripts/export.py")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's errors have no common class
        raise UserError(f"ONNX file {path} is damaged ({type(error).__name__}); export it again") from None
    if properties(model).get(METADATA[0]) != FORMAT:
        raise UserError(
            f"{path} is not an ONNX model written by this project ({FORMAT}); write it with scripts/export.py"
        )
    return model


def properties(model: onnx.ModelProto) -> dict[str, str]:
    """Return a model's metadata."""
    return {entry.key: entry.value for entry in model.metadata_props}


def check_config(path: Path, model: onnx.ModelProto, here: QuantConfig) -> None:
    """Raise a `UserError` if a file was exported with other widths or modes than a run asks for."""
    there = _config_of(model)
    for name in (field.name for field in fields(QuantConfig) if field.name not in HOW_CHOSEN):
        theirs, ours = (getattr(value, "value", value) for value in (getattr(there, name), getattr(here, name)))
        if theirs != ours:
            raise UserError(f"{path} was exported with {name} {theirs}, this run asks for {ours}; export it again")


def _config_of(model: onnx.ModelProto) -> QuantConfig:
    return QuantConfig.from_dict(json.loads(properties(model)[METADATA[1]]))


def _check_content(path: Path, found: dict[str, str], expected: dict[str, str]) -> None:
    _, _, layout, content, _ = METADATA
    if found[layout] != expected[layout]:
        raise UserError(f"{path} was exported from another network; export it again with this model")
    if found[content] != expected[content]:
        raise UserError(f"{path} was exported with other weights or ranges; export it again with this checkpoint")


def _check_shapes(path: Path, model: onnx.ModelProto, shapes: tuple[tuple[int, ...] | None, ...]) -> None:
    dims = {each.name: each.type.tensor_type.shape.dim[1:] for each in model.graph.input}
    for name, shape in zip((INPUTS[0], INPUTS[2]), shapes, strict=False):
        taken = tuple(dim.dim_value for dim in dims.get(name, ()))
        if taken != tuple(shape or ()):
            there, here = ("×".join(map(str, sides)) or "none" for sides in (taken, shape or ()))
            raise UserError(f"{path} was exported for {name} of shape {there}, this run has {here}; export it again")
