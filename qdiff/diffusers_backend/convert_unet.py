"""A quantized checkpoint as the UNet of a pipeline's folder, and a quantized UNet there as a checkpoint.

A family's functions that write and read pipeline folders make and read the UNet by `component_of` and `tensors_of` of
`qdiff.io.diffusers_files`. The classes here take their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.checkpoint.metadata import read_notes
from qdiff.config import QuantConfig
from qdiff.diffusers_backend.card import calibration_note
from qdiff.diffusers_backend.config import QDiffConfig
from qdiff.diffusers_backend.convert_state import check_convertible, quantization_of, to_ours, to_theirs
from qdiff.diffusers_backend.quantize import make_component
from qdiff.diffusers_backend.registration import METHOD
from qdiff.diffusers_backend.structure import pack_without_values, replace_layers
from qdiff.errors import UserError, first_line
from qdiff.io.diffusers_files import CONFIG, read_json, read_weights
from qdiff.io.files import check_writable, sha256
from qdiff.io.tensor_files import check_readable, check_state, is_pickle
from qdiff.io.tensor_layout import NetworkLayout
from qdiff.quant_model import QuantModel

UNET = "unet"
QUANTIZATION = "quantization_config"
CHECKPOINT = "quantized.safetensors"


class UnetOfCheckpoint:
    """Makes diffusers' quantized UNet from our float network and a quantized checkpoint.

    Args:
        quant: widths and options that the checkpoint was made with.
        checkpoint: native or published.
        probe: see `qdiff.checkpoint.load_checkpoint`.
        base_model: name of the float model, for the model card.

    Raises:
        UserError: the checkpoint cannot be read, or a network quantized so cannot be a component of a pipeline.
    """

    def __init__(
        self,
        quant: QuantConfig,
        checkpoint: str | Path,
        probe: Callable[[], tuple[Tensor, ...]] | None = None,
        base_model: str = "",
    ) -> None:
        check_convertible(quant)
        check_readable(checkpoint)
        self.quant, self.checkpoint, self.probe, self.base_model = quant, Path(checkpoint), probe, base_model

    def __call__(
        self, kind: type, config: Mapping[str, Any], layout: NetworkLayout, network: nn.Module, origin: str
    ) -> nn.Module:
        """As `qdiff.io.diffusers_files.component_of`; ``network`` is wrapped by a `QuantModel` and filled.

        Raises:
            UserError: the checkpoint does not fit (`load_checkpoint`).
        """
        qnn = QuantModel(network, self.quant)
        load_checkpoint(qnn, self.checkpoint, probe=self.probe)
        notes = _card_notes(self.checkpoint) | {"base_model": self.base_model}
        return quantized_component(qnn, kind, config, layout, origin, notes)


def quantized_component(
    qnn: QuantModel,
    kind: type,
    config: Mapping[str, Any],
    layout: NetworkLayout,
    origin: str,
    notes: dict[str, Any] | None = None,
) -> nn.Module:
    """Return diffusers' network quantized as ours, with packed weights, in eval mode; ``save_pretrained`` writes it.

    Args:
        qnn: calibrated, or filled from a checkpoint.
        kind, config: class and arguments of diffusers' network.
        layout: of the network in ``qnn``, made before it was wrapped.
        origin: what is converted, for error messages.
        notes: for the model card (JSON values).

    Raises:
        UserError: a network quantized so cannot be a component of a pipeline.
    """
    with torch.device("meta"):
        made = kind(**config)
    quantization = quantization_of(qnn, layout, notes or {})
    replace_layers(made, quantization)
    to_theirs(qnn, layout, made, origin)
    make_component(made, quantization)
    return made.eval()


class CheckpointOfUnet:
    """Reads the quantized UNet of a pipeline's folder, which `save` then writes as a native checkpoint.

    Args:
        model: file of the float checkpoint; the quantized one is ``quantized.safetensors`` beside it.

    Attributes:
        path: the quantized checkpoint.
        qnn: our network with packed weights, once it was read.

    Raises:
        UserError: the file exists, or could not be written later.
    """

    qnn: QuantModel
    notes: dict[str, Any]

    def __init__(self, model: str | Path) -> None:
        self.path = Path(model).with_name(CHECKPOINT)
        if self.path == Path(model):
            raise UserError(f"{model} is where the quantized UNet will be; give another name for the model")
        check_writable(self.path)
        if self.path.exists():
            raise UserError(f"{self.path} exists; choose another folder, or delete it")

    def __call__(
        self, kind: type, config: Mapping[str, Any], layout: NetworkLayout, network: nn.Module, folder: Path
    ) -> dict[str, Tensor]:
        """As `qdiff.io.diffusers_files.tensors_of`; weights are δ·(q − z), since the folder holds no others.

        Raises:
            UserError: the folder's files are damaged, or its UNet is not quantized as a checkpoint of ours can hold.
        """
        quantization = _read_quantization(folder)
        names = network.state_dict().keys()
        self.qnn, self.notes = QuantModel(network, quantization.quant_config), quantization.notes
        to_ours(_read_network(kind, config, quantization, folder), layout, self.qnn, str(folder))
        layers = {n: layer for n, layer in self.qnn.layers().items() if len(layer.weight_quantizers)}
        weights = {f"{n}.weight": layer.dequantized_weight() for n, layer in layers.items()}
        return {name: weights[name] if name in weights else network.get_parameter(name) for name in names}

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        save_checkpoint(self.qnn, self.path, notes=self.notes)


def is_quantized_folder(folder: str | Path) -> bool:
    """Whether the UNet in a pipeline's folder is quantized, by any method."""
    path = Path(folder) / UNET / CONFIG
    return path.is_file() and read_json(path).get(QUANTIZATION) is not None


def _read_quantization(folder: Path) -> QDiffConfig:
    """Return how the network in a component's folder is quantized."""
    path = folder / CONFIG
    given = read_json(path).get(QUANTIZATION)
    method = given.get("quant_method") if isinstance(given, dict) else given
    if method != METHOD:
        raise UserError(f"{path} has the quantization method {method}; only folders that qdiff wrote can be converted")
    try:
        found = QDiffConfig.from_dict(given)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); copy the folder again") from None
    check_convertible(found.quant_config)
    if found.quant_config.weight_bits is None:
        raise UserError(f"{path} leaves all weights in float, which no sampling script can load; quantize them too")
    return found


def _read_network(kind: type, config: Mapping[str, Any], quantization: QDiffConfig, folder: Path) -> nn.Module:
    """Return the quantized network in a component's folder, in float32."""
    with torch.device("meta"):
        made = kind(**config)
    replace_layers(made, quantization)
    pack_without_values(made)
    state = {n: t.float() if t.is_floating_point() else t for n, t in read_weights(folder).items()}
    check_state(state, made.state_dict(), folder)
    made.load_state_dict(state, assign=True)
    return made


def _card_notes(checkpoint: Path) -> dict[str, Any]:
    """Return what the model card says about the calibration, from a checkpoint."""
    made: dict[str, Any] = {"method": f"published checkpoint {checkpoint.name}"}
    if not is_pickle(checkpoint):
        notes = read_notes(checkpoint)
        made = {name: notes[name] for name in ("method", "seed") if name in notes}
        if "samples" in notes:
            made["calibration"] = calibration_note(f"{notes['samples']} samples", notes.get("refit", 0))
    return made | {"checkpoint": sha256(checkpoint)}
