"""Write a diffusers model as its ``nunchaku_lite`` loader reads it: a folder with ``config.json`` and the weights.

Every quantized linear layer is ``awq_w4a16`` (`qdiff.deploy.awq`):

    ``L.qweight``  int32 [N/4, K/2], interleaved
    ``L.wscales``  [K/64, N] in the compute dtype
    ``L.wzeros``   [K/64, N] in the compute dtype
    ``L.bias``     [N] in the compute dtype

All other tensors are floats in the compute dtype under their own names. ``config.json`` is the model's own, with
``quantization_config`` added, which lists these layers as targets. ``from_pretrained`` of the model's class loads the
folder, on a GPU and with the ``kernels`` package.

Source: diffusers 0.42.1, ``quantizers/nunchaku``; its layout of words is TinyChat's.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.deploy import awq
from qdiff.deploy.weight_format import Encoding, WeightFormat, WriteOptions, Written
from qdiff.deploy.weight_plan import WeightPlan, plan_weights
from qdiff.errors import UserError
from qdiff.io.files import check_writable, written_whole
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

NAME = "nunchaku_lite"
DTYPES = ("bfloat16", "float16")
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# Four rows alternate in memory, and nunchaku's kernel computes two such groups at once: rows beyond the last multiple
# of 8 would be left as they were in memory, without an error.
ROWS = 8


def _awq_tensors(layer: QuantModule, dtype: torch.dtype) -> dict[str, Tensor]:
    scales, zeros = awq.scales_and_zeros(layer, 0, dtype)
    return {"qweight": awq.nibbles_interleaved(layer.integers()), "wscales": scales, "wzeros": zeros}


AWQ = Encoding(
    name="awq_w4a16",
    inputs="their inputs stay in float",
    why_not=functools.partial(awq.why_not_awq, rows=ROWS),
    tensors=_awq_tensors,
)


def _check_target(folder: Path, options: WriteOptions) -> None:
    if options.compute_dtype not in DTYPES:
        raise UserError(
            f"--compute_dtype is {options.compute_dtype}, which the kernels of {NAME} do not take; give it one of "
            f"{', '.join(DTYPES)}"
        )
    if options.prefix:
        raise UserError(f"--prefix is {options.prefix}, and {NAME} keeps the model's own names; leave it out")
    check_writable(folder / CONFIG)
    if others := sorted(p.name for p in folder.glob("*") if p.name not in (CONFIG, WEIGHTS)):
        raise UserError(f"{folder} holds other files (e.g. {others[0]}), which diffusers may load; choose a new folder")


def _planned(qnn: QuantModel, folder: Path, options: WriteOptions) -> WeightPlan:
    _check_target(folder, options)
    _config_of(qnn.model)
    return plan_weights(qnn, NAME, lambda layer: AWQ, options)


def _config_of(network: nn.Module) -> dict[str, Any]:
    """Return the values of a diffusers model's ``config.json``."""
    to_json = getattr(network, "to_json_string", None)
    if to_json is None:
        raise UserError(
            f"{NAME} is a format of diffusers, and {type(network).__name__} is not a model of diffusers; use another "
            "--format"
        )
    return json.loads(to_json())


def check_nunchaku_lite(qnn: QuantModel, folder: str | Path, options: WriteOptions | None = None) -> None:
    """Raise the errors of `write_nunchaku_lite` about network, layers and folder; nothing is written."""
    _planned(qnn, Path(folder), options or WriteOptions())


def write_nunchaku_lite(qnn: QuantModel, folder: str | Path, options: WriteOptions | None = None) -> Written:
    """Write a folder for diffusers (atomic writes, ``config.json`` last); the network is not changed.

    Args:
        qnn: calibrated or loaded network, in any form of its weights, around a diffusers model.
        folder: is made if it is missing; its ``config.json`` and weights are replaced.

    Raises:
        UserError: the network is not a diffusers model; its weights are not quantized; a layer does not fit (the first
            few are named, with the reasons); the folder cannot be written or holds other files; the options do not suit
            the format; or values are outside the range of the compute dtype.
    """
    from safetensors.torch import save_file

    folder, options = Path(folder), options or WriteOptions()
    plan = _planned(qnn, folder, options)
    config = _config_of(qnn.model)
    config["quantization_config"] = {
        "quant_method": NAME,
        "compute_dtype": options.compute_dtype,
        AWQ.name: {"precision": "int4", "group_size": awq.GROUP, "targets": sorted(plan.encodings)},
    }
    tensors = plan.tensors()
    with written_whole(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with written_whole(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return plan.written(folder / WEIGHTS, folder / CONFIG)


NUNCHAKU_LITE = WeightFormat(
    name=NAME,
    title="a folder for diffusers (nunchaku_lite): linear layers of up to 4 bits as awq_w4a16",
    check_target=_check_target,
    check=check_nunchaku_lite,
    write=write_nunchaku_lite,
)
