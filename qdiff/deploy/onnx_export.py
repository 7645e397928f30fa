"""Write a calibrated network as an ONNX model with explicit quantize and dequantize pairs.

Inputs: ``x`` float32 [N, C, H, W], ``t`` float32 [N] and, where conditional, ``context`` float32 [N, L, D]; output
``eps``, x's shape; N is free. Weights up to 4 bits are stored as UINT4 with a zero point a channel, wider ones as INT8
(`qdiff.deploy.onnx_weights`). The metadata tells what the model is: `METADATA`.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdiff.deploy.onnx_leaves import OPSET, OnnxAttention, OnnxLayer
from qdiff.errors import UserError
from qdiff.files import written_whole
from qdiff.native_format import _layout as layout
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

if TYPE_CHECKING:
    import onnx

FORMAT = "qdiff-onnx-1"
METADATA = ("qdiff_format", "qdiff_config", "qdiff_layout", "qdiff_notes")
LARGEST_BATCH = 1 << 16
PROTOBUF_LIMIT = 2_000_000_000  # bytes of one file


class _Denoiser(nn.Module):
    """A network with positional inputs of its own, as the exporter wants them named."""

    def __init__(self, network: nn.Module, conditional: bool) -> None:
        super().__init__()
        self.network = network
        self.forward = self._with_context if conditional else self._plain

    def _plain(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t)

    def _with_context(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return self.network(x, t, context)


def export_onnx(
    qnn: QuantModel,
    path: str | Path,
    image_shape: tuple[int, ...],
    context_shape: tuple[int, ...] | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a network, whole or not at all; the network is not changed.

    Args:
        qnn: calibrated or loaded.
        path: the file (.onnx); an existing one is replaced.
        image_shape: (C, H, W).
        context_shape: (L, D) of the context, or None.
        notes: anything JSON can hold, kept in the metadata.

    Raises:
        UserError: a quantizer was never set; ranges are dynamic or layers modulate, which has no ONNX form here; or the
            ``deploy`` extra is missing.
    """
    onnx = import_onnx()
    from qdiff.deploy.onnx_weights import compact

    config = qnn.config
    if config.act_dynamic or config.modulate:
        what = "--modulate" if config.modulate else "--quant_mode dynamic"
        raise UserError(
            f"{what} cannot be written as ONNX: ranges must be calibrated; leave it out, or use --runtime torch"
        )
    qnn.assert_initialised()
    model = _traced(qnn, image_shape, context_shape)
    compact(model)
    for key, value in metadata_of(qnn, notes or {}).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise UserError(
            f"the ONNX model of this network takes {model.ByteSize()} bytes, more than one file may; use fewer bits"
        )
    onnx.checker.check_model(model)
    with written_whole(path) as temporary:
        onnx.save(model, str(temporary))


def metadata_of(qnn: QuantModel, notes: dict[str, Any]) -> dict[str, str]:
    """Return what an exported file says of its network."""
    values = (FORMAT, json.dumps(qnn.config.to_dict()), layout(qnn), json.dumps(notes))
    return dict(zip(METADATA, values, strict=True))


def import_onnx() -> Any:
    """Import onnx, or say how to get it."""
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install '.[deploy]'") from None
    return onnx


def _traced(qnn: QuantModel, image_shape: tuple[int, ...], context_shape: tuple[int, ...] | None) -> onnx.ModelProto:
    network = _with_onnx_leaves(qnn)
    shapes = {"x": image_shape, "t": (), **({} if context_shape is None else {"context": context_shape})}
    sample = tuple(torch.zeros(2, *shape) for shape in shapes.values())
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of versions of its own parts
            program = torch.onnx.export(
                _Denoiser(network, context_shape is not None),
                sample,
                dynamo=True,
                input_names=list(shapes),
                output_names=["eps"],
                dynamic_shapes=tuple({0: batch} for _ in shapes),
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    model = program.model_proto
    for node in model.graph.node:  # where in Python each came from: more bytes than the weights
        del node.metadata_props[:]
    del model.graph.value_info[:]
    return model


def _with_onnx_leaves(qnn: QuantModel) -> nn.Module:
    """Return a copy of the network on the CPU with traceable leaves; tensors that need not change are shared."""
    memo: dict[int, Any] = {id(t): t for t in (*qnn.model.parameters(), *qnn.model.buffers())}
    network = copy.deepcopy(qnn.model, memo)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantModule):
                setattr(parent, name, OnnxLayer(child))
            elif isinstance(child, QuantAttention):
                setattr(parent, name, OnnxAttention(child))
    return network.float().cpu().eval()
