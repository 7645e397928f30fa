"""Write a network as ComfyUI loads it: one safetensors file, with linear layers as integers of comfy-kitchen's layouts.

A layer of up to 4 bits becomes ``awq_w4a16`` (`qdiff.deploy.awq`) and a wider one ``int8_tensorwise``
(`qdiff.deploy.int8_tensorwise`):

    ``L.weight``        int8 [N, K/2], two channels per byte, or int8 [N, K]
    ``L.weight_scale``  [K/64, N] in the compute dtype, or float32 [N, 1]
    ``L.weight_zeros``  [K/64, N] in the compute dtype; 4 bits only
    ``L.bias``          [N] in the compute dtype

All other tensors are floats under their own names. The file's metadata declares the layers:
``_quantization_metadata`` = {"format_version": "1.0", "layers": {L: {"format": ...}}}, with names as in the file.

Source: ComfyUI's QUANTIZATION.md, comfy/ops.py and comfy/utils.py; comfy-kitchen 0.2.40.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from qdiff.deploy import awq, int8_tensorwise
from qdiff.deploy.weight_format import Encoding, WeightFormat, WriteOptions, Written
from qdiff.deploy.weight_plan import WeightPlan, plan_weights
from qdiff.io.files import check_writable, written_whole
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

NAME = "comfyui"
AWQ_CENTRE = 8  # the level that comfy-kitchen subtracts


def _awq_tensors(layer: QuantModule, dtype: torch.dtype) -> dict[str, Tensor]:
    scales, zeros = awq.scales_and_zeros(layer, AWQ_CENTRE, dtype)
    return {"weight": awq.nibbles_in_order(layer.integers()), "weight_scale": scales, "weight_zeros": zeros}


def _int8_tensors(layer: QuantModule, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": int8_tensorwise.signed_bytes(layer), "weight_scale": int8_tensorwise.scale_of(layer)}


AWQ = Encoding(name="awq_w4a16", inputs="their inputs stay in float", why_not=awq.why_not_awq, tensors=_awq_tensors)
INT8 = Encoding(
    name="int8_tensorwise",
    inputs="ComfyUI quantizes their inputs to 8 bits per row (largest value / 127) at every call",
    why_not=lambda layer, dtype: int8_tensorwise.why_not_int8(layer),
    tensors=_int8_tensors,
)
_ENTRIES = {AWQ.name: {"format": AWQ.name, "group_size": awq.GROUP}, INT8.name: {"format": INT8.name}}


def _encoding_of(layer: QuantModule) -> Encoding:
    bits = [quantizer.bits for quantizer in layer.weight_quantizers]
    return AWQ if max(bits) <= awq.BITS else INT8


def _check_target(path: Path, options: WriteOptions) -> None:
    check_writable(path)


def _planned(qnn: QuantModel, path: Path, options: WriteOptions) -> WeightPlan:
    _check_target(path, options)
    return plan_weights(qnn, NAME, _encoding_of, options)


def check_comfyui(qnn: QuantModel, path: str | Path, options: WriteOptions | None = None) -> None:
    """Raise the errors of `write_comfyui` about layers and path; nothing is written."""
    _planned(qnn, Path(path), options or WriteOptions())


def write_comfyui(qnn: QuantModel, path: str | Path, options: WriteOptions | None = None) -> Written:
    """Write a file for ComfyUI (an atomic write); the network is not changed.

    Args:
        qnn: calibrated or loaded network, in any form of its weights.
        path: the file (.safetensors); an existing one is replaced.

    Raises:
        UserError: the weights are not quantized; a layer does not fit (the first few are named, with the reasons); the
            path cannot be written; or values are outside the range of the compute dtype.
    """
    from safetensors.torch import save_file

    path, options = Path(path), options or WriteOptions()
    plan = _planned(qnn, path, options)
    entries = {f"{options.prefix}{name}": _ENTRIES[encoding.name] for name, encoding in plan.encodings.items()}
    metadata = {"format_version": "1.0", "layers": entries}
    tensors = plan.tensors()
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "_quantization_metadata": json.dumps(metadata)})
    return plan.written(path)


COMFYUI = WeightFormat(
    name=NAME,
    title="a file for ComfyUI: linear layers as awq_w4a16 (up to 4 bits) and int8_tensorwise",
    check_target=_check_target,
    check=check_comfyui,
    write=write_comfyui,
)
