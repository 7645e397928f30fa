"""``--runtime``: the runtime that computes the network while sampling."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from pathlib import Path

from torch import nn

from qdiff.cli.options.ptq import PtqPlan
from qdiff.cli.processes import Processes
from qdiff.config import QuantConfig
from qdiff.deploy.runtimes import RUNTIMES, onnx_runtimes
from qdiff.errors import UserError
from qdiff.io.tensor_files import is_pickle
from qdiff.pipeline import Network, Pipeline
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

EXPORTED = "model.onnx"
FLOAT = QuantConfig(weight_bits=None, act_bits=None)


def check_runtime(args: Namespace, quant: QuantConfig | None) -> None:
    """Raise a `UserError` if options of a runtime contradict each other, or it cannot run the network they ask for.

    Args:
        quant: None for a float network.
    """
    runtime, exported = RUNTIMES[args.runtime], onnx_runtimes()
    if args.onnx is not None and args.runtime not in exported:
        raise UserError(f"--onnx needs --runtime {' or '.join(exported)}; add it, or leave --onnx out")
    if args.weight_cache and not runtime.takes_weight_cache:
        named = " or ".join(name for name, other in RUNTIMES.items() if other.takes_weight_cache)
        raise UserError(f"--weight_cache needs --runtime {named}; add it, or leave --weight_cache out")
    if args.fused_kernels and args.runtime in exported:
        raise UserError(
            f"--fused_kernels needs CUDA, and --runtime {args.runtime} runs on the CPU; leave one of them out"
        )
    if args.cache_temporal is not None and args.runtime in exported:
        raise UserError(
            f"--cache_temporal contradicts --runtime {args.runtime}, which computes the whole network at every call; "
            "leave one of them out"
        )
    check_weight_cache(args)
    runtime.check(quant)
    if args.onnx is not None:
        check_onnx_file(Path(args.onnx), quant)


def check_onnx_file(path: Path, quant: QuantConfig | None) -> None:
    """Raise a `UserError` if a file was not exported by this project, or has other widths or modes.

    Args:
        quant: None for a float network.
    """
    from qdiff.deploy.onnx_network import check_config, read_model

    check_config(path, read_model(path), FLOAT if quant is None else quant)


def check_weight_cache(args: Namespace) -> None:
    """Raise a `UserError` if ``--weight_cache`` is negative, infinite or not a number."""
    if not 0 <= args.weight_cache < math.inf:
        raise UserError(f"--weight_cache is {args.weight_cache}; give 0 or more MiB")


def wrapped(network: nn.Module) -> QuantModel:
    """Return a float network as a `QuantModel` without quantizers."""
    return QuantModel(network, FLOAT)


def starts_packed(args: Namespace, plan: PtqPlan | None) -> bool:
    """Whether the float network need not be loaded, because a native file holds everything that the runtime needs."""
    if not RUNTIMES[args.runtime].packs or plan is None or plan.action != "load" or plan.quant.weight_bits is None:
        return False
    return not is_pickle(Path(plan.checkpoint))


def pack(args: Namespace, qnn: QuantModel) -> None:
    """Convert a network's weights permanently to the form that the runtime computes with."""
    RUNTIMES[args.runtime].prepare(qnn, int(args.weight_cache * 2**20))


def onnx_network(args: Namespace, pipeline: Pipeline, qnn: QuantModel, folder: Path, processes: Processes) -> Network:
    """Return the network as computed by an ONNX runtime, exporting it first if that was not done yet.

    Args:
        qnn: the network of the export. Its weights are released unless they are packed: the runtime holds its own.
        folder: the run folder, which keeps the exported model unless ``--onnx`` names one.
        processes: the first of them exports.

    Raises:
        UserError: the file is damaged, or belongs to another network or other widths; or the network cannot be
            exported.
    """
    from qdiff.deploy.onnx_export import export_onnx
    from qdiff.deploy.onnx_network import OnnxNetwork

    path = Path(args.onnx) if args.onnx is not None else folder / EXPORTED
    shapes = (pipeline.input_shape, pipeline.context_shape)
    is_new = args.onnx is None and not path.is_file() and processes.is_first
    if is_new:
        log.info("exporting to %s", path)
        export_onnx(qnn, path, *shapes)
    processes.wait()
    network = OnnxNetwork(path, args.runtime, qnn=None if is_new else qnn, shapes=shapes)
    if not qnn.is_packed:
        qnn.to("meta")
    return network
