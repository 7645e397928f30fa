"""From the options of scripts/benchmark.py to its table."""

from __future__ import annotations

import copy
import datetime
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qdiff.calibration.samples import CalibrationSet
from qdiff.checkpoint import load_checkpoint
from qdiff.cli import benchmark
from qdiff.cli.deploy import wrapped
from qdiff.cli.document import DocumentBlock
from qdiff.cli.float_model import FloatModel
from qdiff.cli.ptq import PtqPlan, resolve_ptq
from qdiff.errors import UserError
from qdiff.files import check_writable
from qdiff.methods import linear
from qdiff.methods.common import CalibrationRun
from qdiff.quant_model import QuantModel
from qdiff.random_weights import randomised

RANDOM_SAMPLES = 4


def run_benchmark(args: Namespace, model_class: Callable[[Namespace], FloatModel]) -> None:
    """Measure, print the table, and write what was asked for.

    Raises:
        UserError: options that contradict each other, or files that cannot be read or written.
    """
    for option in ("batch", "repeats", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; give at least 1")
    variants = benchmark.chosen_variants(args.runtimes)
    block = None if args.document is None else DocumentBlock(args.document, args.table)
    if args.out is not None:
        check_writable(args.out)
    if args.random:
        if args.cali_ckpt or getattr(args, "ckpt", None):
            raise UserError(
                "--random takes random weights and contradicts --cali_ckpt and --ckpt; leave one of them out"
            )
        if not args.ptq:
            args.ptq = args.quant_act = True
        args.quant_mode = "linear"
        args.use_pretrained = True  # of which only the shapes are taken
    args.batch_size = args.batch
    model = model_class(args)
    plan = resolve_ptq(args, model.weight_range, model.act_range)
    if plan is None or (plan.action != "load" and not args.random):
        raise UserError("a calibrated network is what is measured; give --ptq and --cali_ckpt PATH, or --random")
    threads = args.threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        network = _prepared(args, model, plan, Path(folder), set(variants))
        for note in model.notes:
            print(note, file=sys.stderr)
        rows = benchmark.measure(network, variants, args.repeats, threads, model.calls)
    quant = plan.quant
    widths = f"W{quant.weight_bits}A{quant.act_bits or 32}{' split' if quant.split_shortcut else ''}"
    about = {
        "model": f"{model.name}{', random weights' if args.random else ''}",
        "quant": widths,
        "config": quant.to_dict(),
        "batch": args.batch,
        "calls": model.calls,
        "repeats": args.repeats,
        "machine": benchmark.machine(threads),
        "date": datetime.date.today().isoformat(),
    }
    text = benchmark.markdown(rows, about)
    print(text)
    if args.out is not None:
        benchmark.write_json(args.out, rows, about)
    if block is not None:
        block.replace(text)


def _prepared(args: Namespace, model: FloatModel, plan: PtqPlan, folder: Path, variants: set[str]) -> benchmark.Network:
    if args.random:
        network, context_shape = model.build_network()
        network = randomised(network)
    else:
        model.load(torch.device("cpu"))
        network, context_shape = model.network, model.context_shape
    network = network.eval().requires_grad_(False)
    qnn, inputs = QuantModel(copy.deepcopy(network), plan.quant), _inputs(model, context_shape, args.batch)
    if args.random:
        data = CalibrationSet(_inputs(model, context_shape, RANDOM_SAMPLES))
        linear.calibrate(qnn, data, CalibrationRun(show_progress=False))
    else:
        load_checkpoint(qnn, plan.checkpoint)
    size = None if plan.checkpoint is None else Path(plan.checkpoint).stat().st_size
    made = benchmark.Network(network, qnn, None, None, inputs, size)
    if not variants & set(benchmark.EXPORTED):
        return made
    from qdiff.deploy.onnx_export import export_onnx

    if any(name.endswith("-float") for name in variants):
        made = replace(made, float_onnx=folder / "float.onnx")
        export_onnx(wrapped(copy.deepcopy(network)), made.float_onnx, model.input_shape, context_shape)
    if variants & {"onnxruntime", "openvino"}:
        made = replace(made, onnx=folder / "quantized.onnx")
        export_onnx(qnn, made.onnx, model.input_shape, context_shape)
    return made


def _inputs(model: FloatModel, context_shape: tuple[int, ...] | None, count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *model.input_shape, generator=generator)
    t = torch.linspace(0, 999, count)
    return (x, t) if context_shape is None else (x, t, torch.randn(count, *context_shape, generator=generator))
