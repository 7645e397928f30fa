"""Measure a network as float torch, simulated and in ONNX runtimes, in alternation: time, memory, bytes.

Variants take turns (A B C A B C …), so that whatever else the machine does meets them all alike; what is printed are
medians, and ratios of the medians with the spread of the ratios turn by turn.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.process_memory import measured
from qdiff.quant_model import QuantModel

Call = Callable[[], object]
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
BASE = "torch"


@dataclass(frozen=True)
class Network:
    """What every variant computes.

    Attributes:
        float_network: with float weights.
        qnn: the same, quantized; a network of its own.
        float_onnx, onnx: exported files of both.
        inputs: (x, t) or (x, t, context), one batch.
        checkpoint_bytes: of the quantized checkpoint; None where there is no file.
    """

    float_network: nn.Module
    qnn: QuantModel
    float_onnx: Path | None
    onnx: Path | None
    inputs: tuple[Tensor, ...]
    checkpoint_bytes: int | None = None


@dataclass
class Row:
    """What was measured of a variant.

    Attributes:
        latency_s: median seconds of a network call.
        low_s, high_s: quartiles.
        ratio: median of `BASE` divided by this one's, above 1 is faster; None without `BASE`.
        ratio_low, ratio_high: quartiles of the ratio turn by turn.
        images_per_s: batch / (latency × calls of the sampler).
        peak_bytes: peak resident memory of a fresh process that loads and calls it; None where it was not measured.
        file_bytes: of what it loads; None for what has no file of its own.
        note: why there are no numbers, where there are none.
    """

    variant: str
    latency_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    images_per_s: float | None = None
    peak_bytes: int | None = None
    file_bytes: int | None = None
    note: str = ""


def _torch(network: Network, threads: int) -> Call:
    model = network.float_network
    return lambda: model(*network.inputs)


def _channels_last(network: Network, threads: int) -> Call:
    model = copy.deepcopy(network.float_network).to(memory_format=torch.channels_last)
    x, *rest = network.inputs
    given = (x.contiguous(memory_format=torch.channels_last), *rest)
    return lambda: model(*given)


def _compiled(network: Network, threads: int) -> Call:
    model = torch.compile(network.float_network)
    return lambda: model(*network.inputs)


def _simulated(network: Network, threads: int) -> Call:
    qnn = network.qnn

    def call() -> Tensor:
        return qnn(*network.inputs)

    # Entered for good: a step of sampling finds the weights dequantized already.
    stack = contextlib.ExitStack()
    stack.enter_context(qnn.quantized())
    call.stack = stack
    return call


def _onnx(runtime: str, quantized: bool) -> Callable[[Network, int], Call]:
    def opened(network: Network, threads: int) -> Call:
        from qdiff.deploy.runtimes import OnnxNetwork

        model = OnnxNetwork(network.onnx if quantized else network.float_onnx, runtime, threads)
        return lambda: model(*network.inputs)

    return opened


VARIANTS: dict[str, Callable[[Network, int], Call]] = {
    BASE: _torch,
    "torch-channels-last": _channels_last,
    "torch-compile": _compiled,
    "simulated": _simulated,
    "onnxruntime-float": _onnx("onnxruntime", False),
    "onnxruntime": _onnx("onnxruntime", True),
    "openvino-float": _onnx("openvino", False),
    "openvino": _onnx("openvino", True),
}
EXPORTED = tuple(name for name in VARIANTS if name.startswith(("onnxruntime", "openvino")))


def chosen_variants(text: str | None) -> list[str]:
    """Return the variants of ``--runtimes``, names separated by commas; all for None.

    Raises:
        UserError: a name that is none.
    """
    if text is None:
        return list(VARIANTS)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--runtimes has no {name!r}; choose from {', '.join(VARIANTS)}")
    return list(dict.fromkeys(names))


@torch.no_grad()
def measure(network: Network, variants: Sequence[str], repeats: int, threads: int, calls: int) -> list[Row]:
    """Time variants in alternation and measure the memory of each in a process of its own.

    Args:
        repeats: turns.
        threads: of torch and of the runtimes.
        calls: network calls of the sampler, for images/s.
    """
    rows = {name: Row(name, file_bytes=_file_bytes(network, name)) for name in variants}
    with _threads(threads):
        opened = dict(_opened(network, rows, threads))
        times = alternated(opened, repeats)
    batch = len(network.inputs[0])
    for name, seconds in times.items():
        row = rows[name]
        row.low_s, row.latency_s, row.high_s = _quartiles(seconds)
        row.images_per_s = batch / (row.latency_s * calls)
        if BASE in times:
            ratios = [base / own for base, own in zip(times[BASE], seconds, strict=True)]
            row.ratio = statistics.median(times[BASE]) / row.latency_s
            row.ratio_low, _, row.ratio_high = _quartiles(ratios)
        row.peak_bytes = peak_of(network, name, threads)
    return list(rows.values())


def _opened(network: Network, rows: dict[str, Row], threads: int) -> Iterator[tuple[str, Call]]:
    """Yield what can be called, called once; what cannot is noted in its row."""
    for name, row in rows.items():
        try:
            call = VARIANTS[name](network, threads)
            call()
        except UserError as error:
            row.note = str(error)
        except Exception as error:  # a compiler is missing, a kernel too: the others are measured all the same
            row.note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        else:
            yield name, call


def alternated(calls: dict[str, Call], repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list]:
    """Call each in turn, ``repeats`` times after one round of warm-up, and return the seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            started = clock()
            call()
            if turn > 0:
                times[name].append(clock() - started)
    return times


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_of(network: Network, variant: str, threads: int) -> int | None:
    """Return the peak resident bytes of a fresh process that calls a variant twice; None where that fails.

    The process holds what the variant needs: an exported file, or the tensors of one network, mapped from a file.
    """
    quantized, exported = variant == "simulated", variant in EXPORTED
    with tempfile.TemporaryDirectory(prefix="peak-") as folder:
        file = Path(folder) / "network.pt"
        bare = nn.Identity() if exported else copy.deepcopy(network.float_network).to("meta")
        state = {} if exported else (network.qnn if quantized else network.float_network).state_dict()
        files = (network.float_onnx, network.onnx)
        config = network.qnn.config if quantized else None
        torch.save({"sent": (bare, config, files, network.inputs, variant, threads), "state": state}, file)
        try:
            return measured(_call_twice, str(file)).peak
        except Exception:  # whatever a backend raises: the time was measured all the same
            return None


@torch.no_grad()
def _call_twice(file: str) -> None:
    saved = torch.load(file, weights_only=False, mmap=True)
    bare, config, files, inputs, variant, threads = saved["sent"]
    torch.set_num_threads(threads)
    bare = bare if config is None else QuantModel(bare, config)
    bare.load_state_dict(saved.pop("state"), assign=True)
    call = VARIANTS[variant](Network(bare, bare, *files, inputs), threads)
    call()
    call()


def _file_bytes(network: Network, variant: str) -> int | None:
    if variant in EXPORTED:
        path = network.float_onnx if variant.endswith("-float") else network.onnx
        return None if path is None else path.stat().st_size
    if variant == "simulated":
        return network.checkpoint_bytes
    return sum(p.numel() * 4 for p in network.float_network.parameters())


def machine(threads: int) -> dict[str, Any]:
    """Describe where it was measured: CPU, its flags, cores, threads, versions."""
    from qdiff.cli.run_folder import installed_versions

    name, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() == "flags":
                flags = set(value.split())
    return {
        "cpu": name,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": threads,
        "packages": installed_versions(("torch", "onnx", "onnxruntime", "openvino")),
    }


def markdown(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """Return the table and a line that says what was measured where."""
    lines = [
        "| variant | a call ↓ | × torch ↑ | images/s ↑ | peak memory ↓ | file ↓ |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.latency_s is None:
            lines.append(f"| {row.variant} | not measured: {row.note.replace('|', '/')} | – | – | – | – |")
            continue
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})"
        cells = [
            row.variant,
            f"{_ms(row.latency_s)} ({_ms(row.low_s)}–{_ms(row.high_s)}) ms",
            ratio,
            f"{row.images_per_s:.3g}",
            "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f} MB",
            "–" if row.file_bytes is None else f"{row.file_bytes / 1e6:.2f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    there = about["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in there["packages"].items() if version)
    what = f"{about['model']}, {about['quant']}; batch {about['batch']}, {about['calls']} network calls an image"
    how = f"medians of {about['repeats']} turns in alternation, quartiles in brackets; memory: peak of a fresh process"
    where = f"{there['cpu']} ({' '.join(there['flags']) or 'no vector flags known'}), {there['cores']} cores"
    load = f"{there['threads']} thread(s), load {there['load']}"
    lines += ["", f"{what}; {how}; {where}, {load}; {versions}; {about['date']}."]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:.0f}"


def write_json(path: str | Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write what was measured, whole."""
    from qdiff.files import written_whole

    with written_whole(path) as temporary:
        temporary.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
