"""The lines of scripts/gpu_check.py about networks with random weights: time and memory, calls and calibration."""

from __future__ import annotations

import contextlib
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.benchmark.gpu_check import Line
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.cli.options.ptq import PtqPlan, add_ptq_options, resolve_ptq
from qdiff.cli.processes import choose_device
from qdiff.cli.script import Scripts, parser_like
from qdiff.io.random_weights import randomised
from qdiff.methods import qdiffusion
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel

WARM_UP, CALLS = 3, 10


@dataclass(frozen=True)
class Size:
    """What is measured of a network.

    Attributes:
        like: the sampling script whose model it is.
        words: options of that script that name the model.
        batch: samples in a call.
        samples: of the calibration.
        iterations: of every unit, of weights and of activations.
    """

    like: str
    words: tuple[str, ...]
    batch: int
    samples: int
    iterations: int


CIFAR10 = Size("sample_diffusion_ddim", ("--config", "configs/cifar10.yml", "--use_pretrained"), 64, 32, 5)
SMALL_DDIM = Size("sample_diffusion_ddim", ("--config", "configs/digits.yml", "--use_pretrained"), 2, 2, 2)
STABLE_DIFFUSION = Size("txt2img", ("--config", "configs/stable-diffusion/v1-inference.yaml"), 4, 4, 3)
SMALL_TEXT = Size("txt2img", ("--config", "models/ldm/digits_text/config.yaml"), 2, 2, 2)
QUANT = (
    "--ptq",
    "--weight_bit",
    "4",
    "--quant_act",
    "--act_bit",
    "8",
    "--split",
    "--w_range",
    "max",
    "--a_range",
    "max",
)


def cifar10_lines(args: Namespace, scripts: Scripts) -> Iterator[Line]:
    """Yield the lines of the CIFAR-10 UNet."""
    return _lines(SMALL_DDIM if args.small else CIFAR10, args.device, scripts)


def stable_diffusion_lines(args: Namespace, scripts: Scripts) -> Iterator[Line]:
    """Yield the lines of Stable Diffusion's UNet."""
    return _lines(SMALL_TEXT if args.small else STABLE_DIFFUSION, args.device, scripts)


def _lines(size: Size, device_name: str, scripts: Scripts) -> Iterator[Line]:
    device = choose_device(device_name)
    pipeline, plan = _pipeline_and_plan(size, scripts)
    network, context_shape = pipeline.build_network()
    network = randomised(network).to(device).eval().requires_grad_(False)
    shapes = (pipeline.input_shape, context_shape)
    parameters = sum(p.numel() for p in network.parameters())
    yield Line("network", f"{parameters / 1e6:.0f} million random weights, input {list(pipeline.input_shape)}")
    inputs = _inputs(size.batch, shapes, device)
    half = torch.autocast(device.type, dtype=torch.bfloat16)
    yield _called("float32", network, inputs)
    yield _called("bfloat16 (autocast)", network, inputs, half)

    qnn = QuantModel(network, plan.quant)
    data = CalibrationSet(_inputs(size.samples, shapes, torch.device("cpu")))
    run = CalibrationRun(show_progress=False)
    seconds, peak = _measured(device, lambda: qdiffusion.calibrate(qnn, data, plan.recipe, run))
    what = f"calibration W4A8, {size.samples} samples, {size.iterations} iterations per unit, twice"
    values = {"seconds": seconds, "peak_bytes": peak, "units": len(run.errors)}
    yield Line(what, f"{seconds:.1f} s for {len(run.errors)} units, {_memory(peak)}", values=values)

    qnn.release_float_weights()
    with qnn.quantized():
        yield _called("W4A8 simulated", qnn, inputs)
    with half, qnn.quantized():
        yield _called("W4A8 simulated, bfloat16 (autocast)", qnn, inputs)


def _pipeline_and_plan(size: Size, scripts: Scripts) -> tuple[Pipeline, PtqPlan]:
    words = ["--like", size.like, *size.words, *QUANT]
    parser = parser_like(None, words, scripts)
    add_ptq_options(parser, resume=False)
    args = parser.parse_args(words)
    args.batch_size = size.batch
    args.cali_iters = args.cali_iters_a = size.iterations
    args.cali_st, args.cali_n = 1, size.samples
    pipeline: Pipeline = scripts[size.like].pipeline_of(args)
    plan = resolve_ptq(args, pipeline.weight_range, pipeline.act_range)
    return pipeline, plan


def _inputs(count: int, shapes: tuple[tuple[int, ...], tuple[int, ...] | None], device: torch.device) -> tuple:
    """Return (x, t) or (x, t, context) of random values."""
    generator = torch.Generator().manual_seed(0)
    image, context = shapes
    x, t = torch.randn(count, *image, generator=generator), torch.linspace(1, 990, count).round()
    made = (x, t) if context is None else (x, t, torch.randn(count, *context, generator=generator))
    return tuple(value.to(device) for value in made)


@torch.no_grad()
def _called(
    what: str,
    network: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    precision: contextlib.AbstractContextManager | None = None,
) -> Line:
    """Return the line of one call's time, the mean of `CALLS`, and its peak memory."""
    device = inputs[0].device
    with precision or contextlib.nullcontext():
        for _ in range(WARM_UP):
            output = network(*inputs)

        def calls() -> None:
            for _ in range(CALLS):
                network(*inputs)

        seconds, peak = _measured(device, calls)
    finite = bool(torch.isfinite(output).all())
    count = len(inputs[0])
    found = f"{1000 * seconds / CALLS:.1f} ms per call of {count} samples, {_memory(peak)}"
    values = {"seconds_per_call": seconds / CALLS, "samples": count, "peak_bytes": peak}
    return Line(what, found if finite else f"{found}, NOT FINITE", "finite", finite, values)


def _measured(device: torch.device, work: Callable[[], object]) -> tuple[float, int | None]:
    """Return the seconds of some work, and on CUDA the most bytes that it had allocated."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, torch.cuda.max_memory_allocated(device) if on_gpu else None


def _memory(peak: int | None) -> str:
    return "memory not measured" if peak is None else f"{peak / 2**30:.2f} GiB at most"
