"""Parity of runtimes: ε and images of each runtime against the simulated network's."""

from __future__ import annotations

import contextlib
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qdiff.checkpoint import load_checkpoint
from qdiff.cli.options.parser import chosen_runtimes
from qdiff.cli.options.ptq import PtqPlan, resolve_ptq
from qdiff.cli.processes import choose_device
from qdiff.cli.quantize import wrap_network
from qdiff.cli.runtime import check_onnx_file
from qdiff.deploy.runtimes import RUNTIMES, onnx_runtimes
from qdiff.deploy.torch_runtimes import SIMULATED
from qdiff.errors import UserError, require_at_least
from qdiff.evaluation.fidelity import PEAK, PSNR_CAP
from qdiff.io.images import to_uint8
from qdiff.io.markdown import markdown_table
from qdiff.modes import leaves
from qdiff.pipeline import Network, Pipeline
from qdiff.quant_model import QuantModel

if TYPE_CHECKING:
    from qdiff.deploy.onnx_network import OnnxNetwork

FLOAT, LAST_BITS = "float", "simulated, last bits moved"
LAST_BIT = 2.0**-23  # last bit of float32's mantissa

Trajectory = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Sampled:
    """One batch sampled by the simulated network.

    Attributes:
        rows: numbers of its images.
        calls: the network's inputs at every call, in order (guidance doubles the batch).
        eps: the network's outputs.
        images: uint8 [N, H, W, C].
    """

    rows: Sequence[int]
    calls: list[tuple[Tensor, ...]]
    eps: list[Tensor]
    images: np.ndarray


@dataclass(frozen=True)
class Parity:
    """Difference of a network from the simulated one.

    Attributes:
        by_call: ‖ε − ε_simulated‖ / ‖ε_simulated‖ at every call of the sampler, both for the inputs of the simulated
            network at that call.
        mean, largest: mean and maximum over the calls.
        psnr: PSNR of the images that it samples by itself against the simulated ones: the mean over the images in dB,
            each at most `PSNR_CAP`.
        identical: number of images that are equal in every pixel.
    """

    by_call: list[float]
    mean: float
    largest: float
    psnr: float
    identical: int


def compared_runtimes() -> list[str]:
    """Return the names of all runtimes except simulation."""
    return [name for name in RUNTIMES if name != SIMULATED.name]


def resolve(args: Namespace, pipeline: Pipeline) -> tuple[PtqPlan, list[str], dict[str, str]]:
    """Return the plan of a command's options, the runtimes to compare, and why each of the others is left out.

    Raises:
        UserError: no finished checkpoint is given; a requested runtime is unknown, is not installed or cannot run such
            a network; or ``--onnx`` does not fit.
    """
    plan = resolve_ptq(args, pipeline.weight_range, pipeline.act_range)
    if plan is None or plan.action != "load":
        raise UserError("this compares a calibrated network; give --ptq and --cali_ckpt PATH")
    require_at_least(1, {"--images": args.images})
    chosen, skipped = compared_runtimes(), {}
    if args.runtimes is not None:
        chosen = chosen_runtimes(args.runtimes, chosen)
    for name in chosen:
        try:
            RUNTIMES[name].check(plan.quant)
        except UserError as error:
            if args.runtimes is not None:
                raise
            skipped[name] = str(error)
    chosen = [name for name in chosen if name not in skipped]
    if args.onnx is not None:
        if not set(chosen) & set(onnx_runtimes()):
            named = " and ".join(onnx_runtimes())
            raise UserError(f"--onnx needs one of the runtimes {named}; add one, or leave --onnx out")
        check_onnx_file(Path(args.onnx), plan.quant)
    return plan, chosen, skipped


@torch.no_grad()
def compare(
    pipeline: Pipeline,
    plan: PtqPlan,
    runtimes: Sequence[str],
    images: int,
    device: str | None = None,
    onnx: str | Path | None = None,
) -> dict[str, Any]:
    """Sample with the simulated network, then compare float and every runtime with it.

    Args:
        runtimes: names among `compared_runtimes`.
        images: number of images, from the first.
        onnx: the exported model; None exports into a temporary folder.

    Returns:
        ``timesteps`` of the sampler's calls; ``rows``, per network the values of a `Parity`: first `FLOAT` and
        `LAST_BITS` for scale (the simulated network with `last_bits_moved`, the effect of another summation order),
        then the runtimes.
    """
    pipeline.load(choose_device(device))
    qnn = wrap_network(pipeline.network, plan)
    load_checkpoint(qnn, plan.checkpoint, probe=pipeline.probe)
    # First, before packing and the long work, because the file may not fit.
    networks = _exported(pipeline, qnn, [name for name in runtimes if name in onnx_runtimes()], onnx)
    batches = list(_simulated(pipeline, qnn, images))
    found = {FLOAT: measure(pipeline, qnn, batches, qnn.trajectory)}
    with qnn.quantized(), last_bits_moved(qnn):
        found[LAST_BITS] = measure(pipeline, qnn, batches, qnn.trajectory)
    for name in runtimes:
        if name in networks:
            found[name] = measure(pipeline, networks[name], batches, networks[name].trajectory)
            continue
        RUNTIMES[name].prepare(qnn)  # permanently
        with qnn.quantized():
            found[name] = measure(pipeline, qnn, batches, qnn.trajectory)
    return {
        "timesteps": [float(t[0]) for _, t, *_ in batches[0].calls],
        "rows": {name: asdict(parity) for name, parity in found.items()},
    }


def _exported(
    pipeline: Pipeline, qnn: QuantModel, names: Sequence[str], given: str | Path | None
) -> dict[str, OnnxNetwork]:
    """Return the network in each ONNX runtime, from a file or exported for it."""
    if not names:
        return {}
    from qdiff.deploy.onnx_export import export_onnx
    from qdiff.deploy.onnx_network import OnnxNetwork

    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        shapes = (pipeline.input_shape, pipeline.context_shape)
        if given is not None:
            return {name: OnnxNetwork(given, name, qnn=qnn, shapes=shapes) for name in names}
        path = Path(folder) / "model.onnx"
        export_onnx(qnn, path, *shapes)
        return {name: OnnxNetwork(path, name) for name in names}


def _simulated(pipeline: Pipeline, qnn: QuantModel, images: int) -> Iterator[Sampled]:
    with qnn.quantized():  # entered once, because entering dequantizes all weights
        for first in range(0, images, pipeline.batch_size):
            rows, calls, eps = range(first, min(first + pipeline.batch_size, images)), [], []

            def listened(*inputs: Tensor, calls: list = calls, eps: list = eps) -> Tensor:
                calls.append(inputs)
                eps.append(qnn(*inputs))
                return eps[-1]

            made = _images(pipeline, listened, rows, qnn.trajectory)
            yield Sampled(rows, calls, eps, made)


@contextlib.contextmanager
def last_bits_moved(qnn: QuantModel) -> Iterator[None]:
    """Inside the block, move every input value of quantized layers by its last bit, up or down."""
    generator = torch.Generator().manual_seed(0)

    def moved(leaf: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ups = [torch.rand(x.shape, generator=generator) < 0.5 for x in inputs]
        return tuple(x * torch.where(up, 1 + LAST_BIT, 1 - LAST_BIT).to(x) for x, up in zip(inputs, ups, strict=True))

    hooks = [leaf.register_forward_pre_hook(moved) for leaf in leaves(qnn.model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _images(pipeline: Pipeline, network: Network, rows: Sequence[int], trajectory: Trajectory) -> np.ndarray:
    with trajectory():
        return to_uint8(pipeline.to_images(pipeline.sample(network, rows)))


@torch.no_grad()
def measure(pipeline: Pipeline, network: Network, batches: Sequence[Sampled], trajectory: Trajectory) -> Parity:
    """Compare a network with the results of the simulated one.

    Args:
        network: ε(x, t[, context]).
        trajectory: opens the context for sampling one batch, in which modulated networks remember the previous call.
    """
    errors, squares = np.zeros((2, len(batches[0].calls)))
    psnr: list[np.ndarray] = []
    for batch in batches:
        with trajectory():
            for i, (inputs, expected) in enumerate(zip(batch.calls, batch.eps, strict=True)):
                errors[i] += float((network(*inputs).double() - expected.double()).square().sum())
                squares[i] += float(expected.double().square().sum())
        psnr.append(image_psnr(_images(pipeline, network, batch.rows, trajectory), batch.images))
    by_call, each = np.sqrt(errors / squares), np.concatenate(psnr)
    same = int(np.isinf(each).sum())
    return Parity(
        by_call.tolist(), float(by_call.mean()), float(by_call.max()), float(each.clip(max=PSNR_CAP).mean()), same
    )


def image_psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return 10·log10(255² / mean squared error) in dB per pair of uint8 images [N, H, W, C]; ∞ for equal images."""
    error = np.square(images.astype(float) - others.astype(float)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / error)


def markdown(found: dict[str, Any], images: int) -> str:
    """Return the rows of `compare` as a table."""
    head = ["against simulated", "error of ε, mean ↓", "largest ↓", "PSNR of the images ↑", "identical"]
    lines = []
    for name, row in found["rows"].items():
        error = [f"{row[key]:.1e}" if row[key] else "0" for key in ("mean", "largest")]
        psnr = "–" if row["identical"] == images else f"{row['psnr']:.1f} dB"
        lines.append([name, *error, psnr, f"{row['identical']} of {images}"])
    return markdown_table(lines, head)
