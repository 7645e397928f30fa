"""Run scripts/benchmark.py: from its options to its table."""

from __future__ import annotations

import contextlib
import datetime
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from qdiff.benchmark.files import FLOAT_ONNX, ONNX, Job, file_bytes, write_checkpoints, write_onnx
from qdiff.benchmark.fresh_process import FreshProcess
from qdiff.benchmark.machine import describe_machine
from qdiff.benchmark.table import VariantRow, markdown, write_json
from qdiff.benchmark.timing import Spread, Turns, alternated
from qdiff.benchmark.variants import BASE, VARIANTS, chosen_variants, open_variant, prepare, take_turn
from qdiff.cli.document import DocumentBlock
from qdiff.cli.options.ptq import PtqPlan, resolve_ptq
from qdiff.cli.runtime import check_weight_cache
from qdiff.cli.script import Scripts
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.io.files import check_writable
from qdiff.io.tensor_files import check_readable
from qdiff.methods.registry import METHODS
from qdiff.pipeline import Pipeline

SAMPLING = "sampling"
WRITES = ("--out", "--document", "--table")


def run_benchmark(args: Namespace, arguments: Sequence[str], scripts: Scripts) -> None:
    """Measure, print the table, and write the requested files.

    Args:
        arguments: the command line that ``args`` was parsed from.
        scripts: the sampling scripts for ``--like``.

    Raises:
        UserError: options contradict each other, or files cannot be read or written.
    """
    variants, block = chosen_variants(args.runtimes), None
    if args.document is not None:
        block = DocumentBlock(args.document, args.table)
    if args.out is not None:
        check_writable(args.out)
    pipeline, plan = _resolved(args, scripts)
    machine = describe_machine(args.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        rows = measure(Job(scripts[args.like], args, plan, Path(folder)), variants)
    about = {
        "model": f"{pipeline.name}{', random weights' if args.random else ''}",
        "quant": widths(plan.quant),
        "config": plan.quant.to_dict(),
        "measure": args.measure,
        "batch": args.batch,
        "calls": pipeline.calls,
        "repeats": args.repeats,
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "command": command_line(arguments),
    }
    text = markdown(rows, about)
    print(text)
    if args.out is not None:
        write_json(args.out, rows, about)
    if block is not None:
        block.replace(text)


def _resolved(args: Namespace, scripts: Scripts) -> tuple[Pipeline, PtqPlan]:
    """Check the options, fill in implied values, and return the pipeline and plan to measure."""
    for option, least in (("batch", 1), ("repeats", 0), ("threads", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise UserError(f"--{option} is {value}; give at least {least}")
    check_weight_cache(args)
    if args.random:
        _imply_random(args)
    args.threads = args.threads or torch.get_num_threads()
    args.batch_size = args.batch
    pipeline = scripts[args.like].pipeline_of(args)
    plan = resolve_ptq(args, pipeline.weight_range, pipeline.act_range)
    if plan is None or (plan.action != "load" and not args.random):
        raise UserError("this measures a calibrated network; give --ptq and --cali_ckpt PATH, or --random")
    if plan.checkpoint is not None:
        check_readable(plan.checkpoint)
    if plan.quant.modulate and args.measure != SAMPLING:
        raise UserError("--modulate needs several steps, but one call is measured; add --measure sampling")
    pipeline.check_modulation(plan.quant)
    if args.random and pipeline.conditional and args.measure == SAMPLING:
        raise UserError(
            f"--like {args.like} samples with conditions, which need an encoder's weights; leave out --random and give "
            "--ckpt, or leave out --measure sampling"
        )
    return pipeline, plan


def _imply_random(args: Namespace) -> None:
    for option in ("cali_ckpt", "ckpt"):
        if getattr(args, option, None):
            raise UserError(f"--random uses random weights and contradicts --{option}; leave one of them out")
    linear = next(name for name, method in METHODS.items() if not method.learns)
    if args.method not in (None, linear, "modiff"):
        raise UserError(f"--random rounds to nearest and contradicts --method {args.method}; leave one of them out")
    args.modulate = args.modulate or args.method == "modiff"
    args.method = linear
    if not args.ptq:
        args.ptq = args.quant_act = True
    args.use_pretrained = True  # only for the weights' shapes


def measure(job: Job, variants: Sequence[str]) -> list[VariantRow]:
    """Write the files, then measure each variant in its own process; if one cannot run, its row says why.

    The processes take turns, and wait between their turns. Without turns they run one after another, so that the
    machine holds only one variant at a time.
    """
    rows = {name: VariantRow(name) for name in variants}
    _write_files(job, rows)
    if job.args.repeats == 0:
        for row in rows.values():
            with FreshProcess() as process:
                _opened(job, row, process)
        return list(rows.values())
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, row in rows.items():
            process = stack.enter_context(FreshProcess())
            if _opened(job, row, process):
                processes[name] = process
        turns = {name: partial(process.on_kept, take_turn) for name, process in processes.items()}
        taken, failures = alternated(turns, job.args.repeats)
    for name, reason in failures.items():
        rows[name].note = reason
    for row in compared(rows, taken):
        if job.args.measure == SAMPLING:
            row.images_per_s = job.args.batch / row.seconds.middle
    return list(rows.values())


def _write_files(job: Job, rows: dict[str, VariantRow]) -> None:
    with FreshProcess() as process:
        for note in process.run(write_checkpoints, job):
            print(note, file=sys.stderr)
    for name in (FLOAT_ONNX, ONNX):
        readers = [row for row in rows.values() if VARIANTS[row.variant].file == name]
        if not readers:
            continue
        try:
            with FreshProcess() as process:
                process.run(write_onnx, job, name)
        except UserError as error:  # the other variants can still be measured
            for row in readers:
                row.note = str(error)


def _opened(job: Job, row: VariantRow, process: FreshProcess) -> bool:
    """Open a variant in a process, store its memory and file size in the row, and return whether that worked."""
    if row.note:
        return False
    try:
        process.run(prepare, job, row.variant)
        use = process.measured(open_variant, job, row.variant)
    except UserError as error:
        row.note = str(error)
        return False
    row.kept, row.peak, row.imports = use.kept, use.taken, use.before
    row.file_bytes = file_bytes(job, VARIANTS[row.variant].file)
    return True


def compared(rows: dict[str, VariantRow], taken: dict[str, Turns]) -> Iterator[VariantRow]:
    """Fill in times and ratios from the turns of all variants, and yield the rows that have any."""
    for name, turns in taken.items():
        row, own_float = rows[name], VARIANTS[name].own_float
        row.seconds, row.calls = Spread.of(turns.seconds), turns.calls
        if BASE in taken:
            row.ratio = Spread.of_ratio(taken[BASE].seconds, turns.seconds)
        if own_float in taken:
            row.own_ratio = Spread.of_ratio(taken[own_float].seconds, turns.seconds)
        yield row


def widths(quant: QuantConfig) -> str:
    """Return the widths as shown in a table."""
    flags = {"split": quant.split_shortcut, "w_sym": quant.weight_symmetric, "a_sym": quant.act_symmetric}
    flags |= {"dynamic": quant.act_dynamic, "modulated": quant.modulate}
    flags |= {"layer_bits": bool(quant.layer_bits)}
    return " ".join([f"W{quant.weight_bits}A{quant.act_bits or 32}", *(flag for flag, on in flags.items() if on)])


def command_line(arguments: Sequence[str]) -> str:
    """Return the command without the options that say where its table is written."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in WRITES:
            next(words, None)
        elif word.partition("=")[0] not in WRITES:
            kept.append(word)
    return shlex.join(["python", "scripts/benchmark.py", *kept])
