"""``--runtime``: what computes the network while sampling."""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from pathlib import Path

from torch import nn

from qdiff.cli.options.parser import ONNX_RUNTIMES, SIMULATED, TORCH_RUNTIMES
from qdiff.cli.options.ptq import PtqPlan
from qdiff.cli.processes import Processes
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.io.tensor_files import is_pickle
from qdiff.kernels.integer_matmul import check_integer_products
from qdiff.pipeline import FloatModel, Network
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

EXPORTED = "model.onnx"
FLOAT = QuantConfig(weight_bits=None, act_bits=None)


def check_runtime(args: Namespace, quant: QuantConfig | None) -> None:
    """Raise a `UserError` where options of a runtime contradict each other, or it cannot run what they ask for.

    Args:
        quant: None for a float network.
    """
    if args.onnx is not None and args.runtime not in ONNX_RUNTIMES:
        raise UserError(f"--onnx is for --runtime {' or '.join(ONNX_RUNTIMES)}; add it, or leave --onnx out")
    if args.weight_cache and args.runtime != "torch":
        raise UserError("--weight_cache is for --runtime torch; add it, or leave --weight_cache out")
    if args.fused_kernels and args.runtime in ONNX_RUNTIMES:
        raise UserError(f"--fused_kernels are for CUDA, and {args.runtime} is on the CPU; leave one of them out")
    check_weight_cache(args)
    check_can_run(args.runtime, quant)
    if args.onnx is not None:
        check_onnx_file(Path(args.onnx), quant)


def check_onnx_file(path: Path, quant: QuantConfig | None) -> None:
    """Raise a `UserError` where a file is none of ours, or was exported with other widths or modes.

    Args:
        quant: None for a float network.
    """
    from qdiff.deploy.runtimes import check_config, read_model

    check_config(path, read_model(path), FLOAT if quant is None else quant)


def check_weight_cache(args: Namespace) -> None:
    """Raise a `UserError` where ``--weight_cache`` is no size."""
    if not 0 <= args.weight_cache < math.inf:
        raise UserError(f"--weight_cache is {args.weight_cache}; give 0 or more MiB")


def check_can_run(runtime: str, quant: QuantConfig | None) -> None:
    """Raise a `UserError` where a runtime is not installed, or cannot run such a network."""
    if runtime in TORCH_RUNTIMES and quant is None:
        raise UserError(f"--runtime {runtime} is for quantized weights; add --ptq, or leave --runtime out")
    if runtime == "torch-int8":
        check_integer_products(quant)
    if runtime not in ONNX_RUNTIMES:
        return
    from qdiff.deploy.onnx_export import check_exportable, import_extra, import_onnx

    import_onnx()
    import_extra(runtime)
    if quant is None:
        return
    check_exportable(quant)
    if quant.act_bits is not None:
        from qdiff.deploy.runtimes import RUNTIMES, check_exact

        check_exact(runtime, RUNTIMES[runtime])


def wrapped(network: nn.Module) -> QuantModel:
    """Return a float network as a `QuantModel` without quantizers."""
    return QuantModel(network, FLOAT)


def starts_packed(args: Namespace, plan: PtqPlan | None) -> bool:
    """Whether the float network need not be loaded: a native file has all that the runtime runs."""
    if args.runtime == SIMULATED or plan is None or plan.action != "load" or plan.quant.weight_bits is None:
        return False
    return not is_pickle(Path(plan.checkpoint))


def pack(args: Namespace, qnn: QuantModel) -> None:
    """Keep the weights packed from now on, where another runtime than simulation is asked for and they have a width."""
    if args.runtime != SIMULATED and qnn.config.weight_bits is not None:
        qnn.pack_weights(int(args.weight_cache * 2**20), integer=args.runtime == "torch-int8")


def onnx_network(args: Namespace, model: FloatModel, qnn: QuantModel, folder: Path, processes: Processes) -> Network:
    """Return the network as a runtime computes it, exported where that was not done yet.

    Args:
        qnn: what is or was exported.
        folder: of the run, where the exported model is kept unless ``--onnx`` names one.
            Its weights are given up unless they are packed: the runtime holds its own.
        processes: the first of them exports.

    Raises:
        UserError: the file is damaged, or of another network or other widths; or the network cannot be exported.
    """
    from qdiff.deploy.onnx_export import export_onnx
    from qdiff.deploy.runtimes import OnnxNetwork

    path = Path(args.onnx) if args.onnx is not None else folder / EXPORTED
    shapes = (model.input_shape, model.context_shape)
    is_new = args.onnx is None and not path.is_file() and processes.is_first
    if is_new:
        log.info("exporting to %s", path)
        export_onnx(qnn, path, *shapes)
    processes.wait()
    network = OnnxNetwork(path, args.runtime, qnn=None if is_new else qnn, shapes=shapes)
    if not qnn.is_packed:
        qnn.to("meta")
    return network
