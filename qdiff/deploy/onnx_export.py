"""Write a calibrated network as an ONNX model with explicit quantize and dequantize pairs.

Inputs: ``x`` float32 [N, C, H, W], ``t`` float32 [N] and, for conditional networks, ``context`` float32 [N, L, D].
Output: ``eps``, in x's shape. N is free. Weights up to 4 bits are stored as UINT4 with one zero point per channel,
wider ones as UINT8 (`qdiff.deploy.onnx_weights`). The metadata describes the model: `METADATA`.

A network that modulates (MoDiff) becomes two models. The model of the first step also returns the state
(``next.state.LAYER.input`` and ``.output``); the model of all later steps takes the state (``state.LAYER.input``, …)
and returns the next one.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from qdiff.checkpoint.native import FLOAT_BYTES, content_hash, layout
from qdiff.config import ActRanges, QuantConfig
from qdiff.errors import UserError
from qdiff.io.files import written_whole
from qdiff.kernels.integer_matmul import check_one_scale
from qdiff.quant_model import QuantModel
from qdiff.tracing.temporal_cache import is_cached

FORMAT = "qdiff-onnx-2"
METADATA = ("qdiff_format", "qdiff_config", "qdiff_layout", "qdiff_content", "qdiff_notes")
PROTOBUF_LIMIT = 2_000_000_000  # bytes per file


def first_step_path(path: str | Path) -> Path:
    """Return the path of the first step's model, for a network that modulates."""
    return Path(f"{str(path).removesuffix('.onnx')}.first.onnx")


def export_onnx(
    qnn: QuantModel,
    path: str | Path,
    image_shape: tuple[int, ...],
    context_shape: tuple[int, ...] | None = None,
    notes: dict[str, Any] | None = None,
) -> list[Path]:
    """Write a network (an atomic write) and return its files; the network is not changed.

    Args:
        qnn: calibrated or loaded network.
        path: the file (.onnx); an existing one is replaced. For a network that modulates, `first_step_path` is written
            beside it.
        image_shape: (C, H, W).
        context_shape: (L, D) of the context, or None.
        notes: JSON values to keep in the metadata.

    Raises:
        UserError: a quantizer is not set; the network cannot be written as ONNX (`check_exportable`); or the
            ``deploy`` extra is missing.
    """
    onnx = import_onnx()
    from qdiff.deploy.onnx_graph import trace
    from qdiff.deploy.onnx_weights import compact

    check_exportable(qnn.config)
    if is_cached(qnn):
        raise UserError(
            "outputs that are looked up by timestep cannot be written as ONNX; export outside of cached_temporal"
        )
    qnn.assert_initialised()
    _check_size(qnn)
    # The model that needs the other is written last, so that if it exists, both exist.
    files = {Path(path): trace(qnn, image_shape, context_shape, later=qnn.config.modulate)}
    if qnn.config.modulate:
        files = {first_step_path(path): trace(qnn, image_shape, context_shape), **files}
    metadata = metadata_of(qnn, notes or {})
    for model in files.values():
        compact(model)
        for key, value in metadata.items():
            entry = model.metadata_props.add()
            entry.key, entry.value = key, value
        onnx.checker.check_model(model)
    for file, model in files.items():
        with written_whole(file) as temporary:
            onnx.save(model, str(temporary))
    return list(files)


def _check_size(qnn: QuantModel) -> None:
    """Raise a `UserError` if the network is too large for protobuf, during tracing or in the final file."""
    weights = {f"{name}.weight": 1 for name, layer in qnn.layers().items() if len(layer.weight_quantizers) > 0}
    size = sum(p.numel() * weights.get(name, FLOAT_BYTES) for name, p in qnn.model.named_parameters())
    if size > PROTOBUF_LIMIT:
        raise UserError(
            f"this network takes {size / 1e9:.1f} GB as ONNX, more than one file holds "
            f"({PROTOBUF_LIMIT / 1e9:.0f} GB); "
            "export it with quantized weights, or run it with another --runtime"
        )


def check_exportable(config: QuantConfig) -> None:
    """Raise a `UserError` if a network cannot be written as ONNX."""
    check_one_scale(config)
    if config.act_ranges is not ActRanges.SHARED:
        raise UserError(
            f"--act_ranges {config.act_ranges.value} cannot be written as ONNX, where an activation has one range for "
            "all timesteps; leave it out, or give --runtime torch or torch-int8"
        )
    if config.ablation is not None:
        raise UserError("--modulate_ablation cannot be written as ONNX; leave it out, or leave --runtime out")


def metadata_of(qnn: QuantModel, notes: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of a network's exported file."""
    values = (FORMAT, json.dumps(qnn.config.to_dict()), layout(qnn), content_hash(qnn), json.dumps(notes))
    return dict(zip(METADATA, values, strict=True))


def import_extra(name: str) -> Any:
    """Import a package of the ``deploy`` extra, or raise a `UserError` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{error.name or name} is not installed; pip install '.[deploy]'") from None


def import_onnx() -> Any:
    """Import onnx and check for onnxscript, which the exporter needs; a `UserError` says how to install them."""
    onnx = import_extra("onnx")
    import_extra("onnxscript")
    return onnx
