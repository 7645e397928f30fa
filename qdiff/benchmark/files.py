"""The files that a benchmark's variants load. They are written first, by processes that then end."""

from __future__ import annotations

import contextlib
import functools
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff.benchmark.parity import LAST_BITS, last_bits_moved
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.cli.options.ptq import PtqPlan
from qdiff.cli.quantize import wrap_network
from qdiff.cli.runtime import wrapped
from qdiff.cli.script import Script
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.io.random_weights import randomised
from qdiff.io.tensor_files import is_pickle, read_safetensors
from qdiff.methods import linear, modiff
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel

RANDOM_SAMPLES = 4
FLOAT, NATIVE, FLOAT_ONNX, ONNX = "float.safetensors", "quantized.safetensors", "float.onnx", "quantized.onnx"


@dataclass(frozen=True)
class Job:
    """Description of a benchmark, passed to each of its processes.

    Attributes:
        script: the sampling script of the model.
        args: the options of scripts/benchmark.py.
        plan: the plan that the options ask for.
        folder: folder of the files.
    """

    script: Script
    args: Namespace
    plan: PtqPlan
    folder: Path

    def pipeline(self) -> Pipeline:
        """Return the model's pipeline, without weights."""
        return self.script.pipeline_of(self.args)

    @property
    def takes_checkpoint(self) -> bool:
        """Whether ``--cali_ckpt`` is the native file itself."""
        return self.plan.checkpoint is not None and not is_pickle(Path(self.plan.checkpoint))

    def path(self, name: str) -> Path:
        """Return the path of one of the files."""
        return Path(self.plan.checkpoint) if name == NATIVE and self.takes_checkpoint else self.folder / name

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Inputs of one call: (x, t) or (x, t, context)."""
        return self._given["inputs"]

    @property
    def conditions(self) -> tuple[Tensor | None, Tensor | None]:
        """Conditions of one batch, as `Pipeline.conditions` returns them."""
        return self._given["conditions"]

    def outputs(self, name: str) -> list[Tensor]:
        """Return the outputs of `checked_calls` in float (`FLOAT`), simulated (`NATIVE`) or with `LAST_BITS` moved."""
        return self._given["outputs"][name]

    @property
    def checked_calls(self) -> list[tuple[Tensor, ...]]:
        """Inputs of one call; for a modulated network, of three in a trajectory: later steps use another model."""
        return _checked_calls(self.inputs, self.plan.quant)

    @functools.cached_property
    def _given(self) -> dict:
        return torch.load(self.folder / "inputs.pt", weights_only=True)

    def float_network(self, copied: bool = False) -> nn.Module:
        """Return the float network; its weights are mapped from the file, or with ``copied`` in memory of their own."""
        network, _ = self.pipeline().build_network()
        state = read_safetensors(self.path(FLOAT))
        if copied:
            state = {name: state.pop(name).clone() for name in list(state)}
        network.load_state_dict(state, assign=True)
        return network.eval().requires_grad_(False)

    def simulated(self) -> QuantModel:
        """Return the quantized network in float32; it still holds its float weights."""
        qnn = QuantModel(self.float_network(copied=True), self.plan.quant)
        load_checkpoint(qnn, self.path(NATIVE))
        return qnn


@torch.no_grad()
def write_checkpoints(job: Job) -> list[str]:
    """Write the float32 file, the quantized file and the inputs; return the model's notes."""
    from safetensors.torch import save_file

    pipeline, is_random = job.pipeline(), job.args.random
    if is_random:
        network, context_shape = pipeline.build_network()
        network, conditions = _with_biases(randomised(network)), (None, None)
    else:
        pipeline.load(torch.device("cpu"))
        network, context_shape = pipeline.network, pipeline.context_shape
        conditions = pipeline.conditions(range(job.args.batch), calibration=False)
    network.eval().requires_grad_(False)
    save_file({name: value.float().contiguous() for name, value in network.state_dict().items()}, job.path(FLOAT))
    inputs = _inputs(pipeline, context_shape, job.args.batch)
    calls = _checked_calls(inputs, job.plan.quant)
    outputs = {FLOAT: [network(*given) for given in calls]}
    qnn = wrap_network(network, job.plan)
    if is_random:
        _calibrate_on_noise(qnn, job.plan, _inputs(pipeline, context_shape, RANDOM_SAMPLES))
    else:
        load_checkpoint(qnn, job.plan.checkpoint, probe=pipeline.probe)
    if not job.takes_checkpoint:
        save_checkpoint(qnn, job.path(NATIVE))
    for name, moved in ((NATIVE, contextlib.nullcontext()), (LAST_BITS, last_bits_moved(qnn))):
        with qnn.quantized(), qnn.trajectory(), moved:
            outputs[name] = [qnn(*given) for given in calls]
    torch.save({"inputs": inputs, "conditions": conditions, "outputs": outputs}, job.folder / "inputs.pt")
    return pipeline.notes


@torch.no_grad()
def write_onnx(job: Job, name: str) -> None:
    """Export the float network (`FLOAT_ONNX`) or the quantized one (`ONNX`); any failure is a `UserError`."""
    from qdiff.deploy.onnx_export import export_onnx

    qnn = wrapped(job.float_network()) if name == FLOAT_ONNX else job.simulated()
    x, _, *context = job.inputs
    try:
        export_onnx(qnn, job.path(name), tuple(x.shape[1:]), tuple(context[0].shape[1:]) if context else None)
    except UserError:
        raise
    except Exception as error:  # any error of the exporter; the other variants can still be measured
        raise UserError(f"the export failed ({type(error).__name__}: {str(error).splitlines()[:1]})"[:160]) from None


def file_bytes(job: Job, name: str) -> int:
    """Return the bytes of a file; for a modulated ONNX model, of both its files together."""
    files = [job.path(name)]
    if name == ONNX and job.plan.quant.modulate:
        from qdiff.deploy.onnx_export import first_step_path

        files.append(first_step_path(files[0]))
    return sum(file.stat().st_size for file in files)


def _inputs(pipeline: Pipeline, context_shape: tuple[int, ...] | None, count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(count, *pipeline.input_shape, generator=generator), torch.linspace(0, 999, count)
    return (x, t) if context_shape is None else (x, t, torch.randn(count, *context_shape, generator=generator))


def _checked_calls(inputs: tuple[Tensor, ...], quant: QuantConfig) -> list[tuple[Tensor, ...]]:
    x, t, *context = inputs
    return [(factor * x, factor * t, *context) for factor in ((1, 0.9, 0.8) if quant.modulate else (1,))]


def _with_biases(network: nn.Module) -> nn.Module:
    """Give random biases to a random network: trained biases are not 0, and a runtime may drop biases of 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def _calibrate_on_noise(qnn: QuantModel, plan: PtqPlan, inputs: tuple[Tensor, ...]) -> None:
    """Set ranges from random inputs: time and memory do not depend on them."""
    run = CalibrationRun(show_progress=False)
    linear.calibrate(qnn, CalibrationSet(inputs), None, run)
    if plan.changes is not None:
        x, t, *context = inputs
        pairs = ((x, 0.9 * x), (t, 0.9 * t), *((c, c) for c in context))
        modiff.calibrate_changes(qnn, CalibrationSet(tuple(torch.stack(p, dim=1) for p in pairs)), plan.changes, run)
