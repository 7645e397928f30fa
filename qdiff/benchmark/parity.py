"""What a network becomes in each runtime: ε and images against the simulated network's."""

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
from qdiff.cli.runtime import check_onnx_file
from qdiff.deploy.runtimes import RUNTIMES, onnx_runtimes
from qdiff.deploy.torch_runtimes import SIMULATED
from qdiff.errors import UserError
from qdiff.evaluation.fidelity import PEAK, PSNR_CAP
from qdiff.io.images import to_uint8
from qdiff.modes import leaves
from qdiff.pipeline import Network, Pipeline
from qdiff.quant_model import QuantModel

if TYPE_CHECKING:
    from qdiff.deploy.onnx_network import OnnxNetwork

FLOAT, LAST_BITS = "float", "simulated, last bits moved"
LAST_BIT = 2.0**-23  # of a float32's mantissa

Trajectory = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Sampled:
    """One batch as the simulated network samples it.

    Attributes:
        rows: numbers of its images.
        calls: what the network was fed at every call, in order (guidance has doubled it).
        eps: what it gave.
        images: uint8 [N, H, W, C].
    """

    rows: Sequence[int]
    calls: list[tuple[Tensor, ...]]
    eps: list[Tensor]
    images: np.ndarray


@dataclass(frozen=True)
class Parity:
    """How far a network is from the simulated one.

    Attributes:
        by_call: ‖ε − ε_simulated‖ / ‖ε_simulated‖ at every call of the sampler, both fed what the simulated network was
            fed there.
        mean, largest: over the calls.
        psnr: of the images that it samples by itself against the simulated ones: the mean over the images in dB, each
            at most `PSNR_CAP`.
        identical: how many images are equal in every pixel.
    """

    by_call: list[float]
    mean: float
    largest: float
    psnr: float
    identical: int


def compared_runtimes() -> list[str]:
    """Return the names of all runtimes but simulation itself."""
    return [name for name in RUNTIMES if name != SIMULATED.name]


def resolve(args: Namespace, pipeline: Pipeline) -> tuple[PtqPlan, list[str], dict[str, str]]:
    """Return the plan of a command's options, the runtimes to compare, and why each of the others is left out.

    Raises:
        UserError: no finished checkpoint is named, or a runtime is named that is none, is not installed or cannot run
            such a network; or ``--onnx`` does not fit.
    """
    plan = resolve_ptq(args, pipeline.weight_range, pipeline.act_range)
    if plan is None or plan.action != "load":
        raise UserError("a calibrated network is what is compared; give --ptq and --cali_ckpt PATH")
    if args.images < 1:
        raise UserError(f"--images is {args.images}; give at least 1")
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
            raise UserError(f"--onnx is for the runtimes {named}; name one, or leave --onnx out")
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
        runtimes: of `compared_runtimes`.
        images: the first so many of the sampler's.
        onnx: the exported model; None exports into a temporary folder.

    Returns:
        ``timesteps`` of the sampler's calls; ``rows``, by network the values of a `Parity`: `FLOAT` and `LAST_BITS` for
        scale (the simulated network with `last_bits_moved`: what another order of summation does), then the runtimes.
    """
    pipeline.load(choose_device(device))
    qnn = QuantModel(pipeline.network, plan.quant)
    load_checkpoint(qnn, plan.checkpoint, probe=pipeline.probe)
    # Before anything is packed, and before the long work: a file may not fit.
    networks = _exported(pipeline, qnn, [name for name in runtimes if name in onnx_runtimes()], onnx)
    batches = list(_simulated(pipeline, qnn, images))
    found = {FLOAT: measure(pipeline, qnn, batches, qnn.trajectory)}
    with qnn.quantized(), last_bits_moved(qnn):
        found[LAST_BITS] = measure(pipeline, qnn, batches, qnn.trajectory)
    for name in runtimes:
        if name in networks:
            found[name] = measure(pipeline, networks[name], batches, networks[name].trajectory)
            continue
        RUNTIMES[name].prepare(qnn)  # for good
        with qnn.quantized():
            found[name] = measure(pipeline, qnn, batches, qnn.trajectory)
    return {
        "timesteps": [float(t[0]) for _, t, *_ in batches[0].calls],
        "rows": {name: asdict(parity) for name, parity in found.items()},
    }


def _exported(
    pipeline: Pipeline, qnn: QuantModel, names: Sequence[str], given: str | Path | None
) -> dict[str, OnnxNetwork]:
    """Return the network in ONNX runtimes, from a file or exported for them."""
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
    with qnn.quantized():  # once: entering dequantizes every weight
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
    """Move every value that comes to a quantized layer by its last bit, up or down, inside the block."""
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
    """Compare a network with what the simulated one sampled.

    Args:
        network: ε(x, t[, context]).
        trajectory: opens what a batch is sampled in; modulated networks remember the call before inside.
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
    """Return 10·log10(255² / mean squared error) in dB of every pair of images uint8 [N, H, W, C]; ∞ for equal ones."""
    error = np.square(images.astype(float) - others.astype(float)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / error)


def markdown(found: dict[str, Any], images: int) -> str:
    """Return the rows of `compare` as a table."""
    lines = [
        "| against simulated | error of ε, mean ↓ | largest ↓ | PSNR of the images ↑ | identical |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in found["rows"].items():
        error = [f"{row[key]:.1e}" if row[key] else "0" for key in ("mean", "largest")]
        psnr = "–" if row["identical"] == images else f"{row['psnr']:.1f} dB"
        lines.append("| " + " | ".join([name, *error, psnr, f"{row['identical']} of {images}"]) + " |")
    return "\n".join(lines)
