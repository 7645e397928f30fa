"""Finished units on disk, so that an interrupted calibration continues at the next one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.io.files import written_whole
from qdiff.io.tensor_files import check_finite
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import Quantizer

# In a unit's file, of the layers whose bias was corrected, and of those that scale their input.
BIAS, SCALE = "quantized_bias", "input_scale"
ERRORS = "errors"  # in the metadata of a unit's file


class CalibrationJournal:
    """One small safetensors file per finished unit, next to the settings that they were made with.

    Args:
        folder: where the files go; created with the first unit.
        settings: everything that the result depends on (JSON values).

    Raises:
        UserError: the folder holds units of a calibration with other settings.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))
        known = self.folder / "settings.json"
        if known.is_file():
            before = _read_settings(known)
            if before != self.settings:
                names = sorted(k for k in before | self.settings if before.get(k) != self.settings.get(k))
                raise UserError(
                    f"{self.folder} holds an unfinished calibration with other settings ({', '.join(names)}); "
                    "delete it or choose another --logdir"
                )

    def _path(self, phase: str, index: int) -> Path:
        return self.folder / f"{phase}-{index:03d}.safetensors"

    def restore(self, phase: str, index: int, module: nn.Module) -> dict[str, float] | None:
        """Fill a unit from disk and return its errors, as they were recorded; None if it was not finished."""
        from safetensors import SafetensorError, safe_open

        path = self._path(phase, index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
                errors = json.loads((file.metadata() or {}).get(ERRORS, "{}"))
            check_finite(state, path)
            _fill(module, state)
        except (SafetensorError, KeyError, RuntimeError, ValueError, OSError):
            path.unlink()  # unreadable: the unit is fitted again
            return None
        return errors

    def record(self, phase: str, index: int, module: nn.Module, errors: dict[str, float]) -> None:
        """Save a finished unit, and the errors of its parts by name."""
        from safetensors.torch import save_file

        if not (self.folder / "settings.json").is_file():
            with written_whole(self.folder / "settings.json") as path:
                path.write_text(json.dumps(self.settings, indent=1))
        with written_whole(self._path(phase, index)) as path:
            save_file(_quantizer_state(module), path, metadata={ERRORS: json.dumps(errors)})

    def discard(self) -> None:
        """Remove the folder: the calibration is finished and saved elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("no settings")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} of an unfinished calibration is damaged ({error}); delete {path.parent} to start again"
        ) from error
    return settings


def _quantizer_state(module: nn.Module) -> dict[str, Tensor]:
    state = {}
    for name, part in module.named_modules():
        if isinstance(part, Quantizer):
            state |= {f"{name}.{k}": v.detach().cpu().contiguous() for k, v in part.state_dict().items()}
        elif isinstance(part, QuantModule):
            if len(part.weight_quantizers):
                state[f"{name}.weight_int"] = part.weight_int.cpu()
            if part.float_bias is not None:
                state[f"{name}.{BIAS}"] = part.bias.detach().cpu()
            if part.input_scale is not None:
                state[f"{name}.{SCALE}"] = part.input_scale.cpu()
    return state


def _fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    layers = {name: part for name, part in module.named_modules() if isinstance(part, QuantModule)}
    biases, scales = (
        {name: state.pop(f"{name}.{kind}") for name in layers if f"{name}.{kind}" in state} for kind in (BIAS, SCALE)
    )
    expected = {k: v for k, v in _quantizer_state(module).items() if not k.endswith((f".{BIAS}", f".{SCALE}"))}
    if (
        {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in expected.items()}
        or any(layers[name].bias is None or layers[name].bias.shape != bias.shape for name, bias in biases.items())
        or any(scale.shape != (layers[name].in_channels,) for name, scale in scales.items())
    ):
        raise ValueError("its tensors do not belong to this unit")  # checked before any is copied
    for name, part in module.named_modules():
        if isinstance(part, Quantizer):
            part.load_state_dict({k: state[f"{name}.{k}"] for k in part.state_dict()})
    for name, layer in layers.items():
        layer.set_input_scale(scales.get(name))
        if len(layer.weight_quantizers):
            layer.set_weight_int(state[f"{name}.weight_int"])
        if name in biases:
            layer.set_quantized_bias(biases[name].to(layer.bias))
