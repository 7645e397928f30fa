"""The variants that a benchmark can measure: each opens its own file in a process of its own."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qdiff.benchmark.files import FLOAT, FLOAT_ONNX, NATIVE, ONNX, Job
from qdiff.benchmark.parity import LAST_BITS
from qdiff.checkpoint import load_packed
from qdiff.cli.options.parser import chosen_runtimes
from qdiff.deploy.runtime import OnnxRuntime, Runtime
from qdiff.deploy.runtimes import RUNTIMES
from qdiff.errors import UserError
from qdiff.pipeline import Network, Pipeline, trajectory_of

BASE = "float"
# Relative L2 error of a call. Float variants differ by summation order only; quantized ones also
# flip values on rounding boundaries (hundredths, more where they modulate: measured by moving the last bits of inputs).
FLOAT_ERROR, QUANTIZED_ERROR, LAST_BITS_ERRORS = 1e-3, 0.06, 1.5


def _float(job: Job) -> Network:
    return job.float_network()


def _channels_last(job: Job) -> Network:
    network = job.float_network().to(memory_format=torch.channels_last)
    return lambda x, *rest: network(x.contiguous(memory_format=torch.channels_last), *rest)


def _compiled(job: Job) -> Network:
    return torch.compile(job.float_network())


def _simulated(job: Job) -> Network:
    qnn = job.simulated()
    qnn.release_float_weights()  # as while sampling
    return _for_good(qnn)


def _packed(runtime: Runtime) -> Callable[[Job], Network]:
    def opened(job: Job) -> Network:
        network, _ = job.pipeline().build_network()
        cache, integer = 0, runtime.multiplies_integers
        if runtime.takes_weight_cache:
            cache = int(job.args.weight_cache * 2**20)
        return _for_good(
            load_packed(network.eval(), job.path(NATIVE), job.plan.quant, cache_bytes=cache, integer=integer)
        )

    return opened


def _for_good(qnn: Network) -> Network:
    """Enter the quantized mode until the process ends: a call then costs what a step of sampling costs."""
    stack = contextlib.ExitStack()
    stack.enter_context(qnn.quantized())
    qnn.mode = stack  # or it would be collected, and the mode left
    return qnn


def _onnx(runtime: str, file: str) -> Callable[[Job], Network]:
    def opened(job: Job) -> Network:
        from qdiff.deploy.onnx_network import OnnxNetwork

        return OnnxNetwork(job.path(file), runtime, job.args.threads)

    return opened


@dataclass(frozen=True)
class Variant:
    """One way to compute the network.

    Attributes:
        file: what it loads.
        open: from that file.
        is_simulation: it computes what is simulated to the bit.
        own_float: the same runtime's float variant, where it is not the base.
        imports: packages that are no business of the memory measured.
    """

    file: str
    open: Callable[[Job], Network]
    is_simulation: bool = False
    own_float: str | None = None
    imports: tuple[str, ...] = ()


def variants_of(runtime: Runtime) -> dict[str, Variant]:
    """Return a runtime's variants: of one that runs exported models, the float model too."""
    name = runtime.name
    if not isinstance(runtime, OnnxRuntime):
        opened = _packed(runtime) if runtime.packs else _simulated
        return {name: Variant(NATIVE, opened, is_simulation=not runtime.multiplies_integers)}
    own_float, packages = f"{name}-float", ("onnx", runtime.package)
    return {
        own_float: Variant(FLOAT_ONNX, _onnx(name, FLOAT_ONNX), imports=packages),
        name: Variant(ONNX, _onnx(name, ONNX), own_float=own_float, imports=packages),
    }


VARIANTS: dict[str, Variant] = {
    BASE: Variant(FLOAT, _float),
    "float-channels-last": Variant(FLOAT, _channels_last),
    "float-compile": Variant(FLOAT, _compiled, imports=("torch._dynamo", "torch._inductor.compile_fx")),
    **{name: variant for runtime in RUNTIMES.values() for name, variant in variants_of(runtime).items()},
}


def chosen_variants(text: str | None) -> list[str]:
    """Return the variants of ``--runtimes``, names separated by commas; all for None.

    Raises:
        UserError: a name that is none.
    """
    return list(VARIANTS) if text is None else chosen_runtimes(text, VARIANTS)


class Opened:
    """A variant that was loaded and has had its first turn.

    Args:
        model: whose sampler a turn runs; None makes it one call.
        inputs: of that call.
        batch: images of a sampling.
    """

    def __init__(self, network: Network, pipeline: Pipeline | None, inputs: tuple[Tensor, ...], batch: int) -> None:
        self._network, self._pipeline, self._inputs, self._batch = network, pipeline, inputs, batch
        self._calls = 0
        self.turn()

    def _counted(self, *inputs: Tensor | None) -> Tensor:
        self._calls += 1
        return self._network(*inputs)

    @torch.no_grad()
    def turn(self, clock: Callable[[], float] = time.perf_counter) -> tuple[float, int]:
        """Call the network once, or sample one batch; return the seconds and the network calls."""
        self._calls, started = 0, clock()
        if self._pipeline is None:
            self._counted(*self._inputs)
        else:
            with trajectory_of(self._network):
                self._pipeline.sample(self._counted, range(self._batch))
        return clock() - started, self._calls


def _check(network: Network, job: Job, name: str) -> None:
    variant = VARIANTS[name]
    reference = FLOAT if variant.file in (FLOAT, FLOAT_ONNX) else NATIVE
    expected, limit = job.outputs(reference), FLOAT_ERROR
    if reference == NATIVE and not variant.is_simulation:
        limit = max(QUANTIZED_ERROR, LAST_BITS_ERRORS * _largest_error(job.outputs(LAST_BITS), expected))
    with trajectory_of(network):
        error = _largest_error([network(*given) for given in job.checked_calls], expected)
    if not error < limit:
        other = "float" if reference == FLOAT else "the simulation"
        raise UserError(f"it computes something else (relative error {error:.2g} against {other})")


def _largest_error(outputs: list[Tensor], expected: list[Tensor]) -> float:
    errors = [(a - b).norm() / b.norm() for a, b in zip(outputs, expected, strict=True)]
    return float(torch.stack(errors).max())  # NaN where any is


def take_turn(opened: Opened) -> tuple[float, int]:
    """What a benchmark asks the process of a variant for."""
    return opened.turn()


def prepare(job: Job, name: str) -> None:
    """Import what a variant needs, and let PyTorch set up what it sets up once."""
    torch.set_num_threads(job.args.threads)
    for package in ("safetensors.torch", *VARIANTS[name].imports):
        with contextlib.suppress(ImportError):  # said when it is opened
            importlib.import_module(package)
    job.pipeline().build_network()
    _ = job.inputs
    torch.zeros_like(torch.empty(1, device="meta"))  # its first use imports sympy, 38 MB
    with torch.no_grad():
        torch.nn.Conv2d(32, 32, 3)(torch.zeros(1, 32, 8, 8))


@torch.no_grad()
def open_variant(job: Job, name: str) -> Opened:
    """Load a variant, check what it computes and give it its first turn, both of which warm it up.

    Raises:
        UserError: it cannot run, or computes something else; the message says why.
    """
    try:
        network, pipeline = VARIANTS[name].open(job), None
        _check(network, job, name)
        if job.args.measure == "sampling":
            pipeline = job.pipeline()
            pipeline.encoded = job.conditions
        return Opened(network, pipeline, job.inputs, job.args.batch)
    except UserError:
        raise
    except Exception as error:  # whatever a compiler or a kernel raises, which may not survive another process
        first = next(iter(str(error).splitlines()), "")
        raise UserError(f"{type(error).__name__}: {first}"[:160]) from None
