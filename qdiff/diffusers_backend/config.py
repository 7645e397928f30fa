"""The ``quantization_config`` of a component's config.json."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Any

from qdiff.config import QuantConfig
from qdiff.diffusers_backend.registration import METHOD
from qdiff.errors import UserError

try:
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin
except ModuleNotFoundError as error:
    library = str(error.name).partition(".")[0]
    raise UserError(
        f'quantized pipelines need the library {library}, which is not installed; run pip install "qdiff[diffusers]"'
    ) from error

FORMAT_VERSION = 1
WIDTHS = tuple(f.name for f in fields(QuantConfig))


class Method(str, Enum):
    """diffusers asks a quantization method for its ``value``."""

    QDIFF = METHOD


class QDiffConfig(QuantizationConfigMixin):
    """How a component of a pipeline is quantized.

    Given to ``from_pretrained`` of a float component, weights are rounded to nearest while they are loaded and
    activations stay in float: ``QDiffConfig(weight_bits=4)``. `qdiff.quantize_pipeline` fills in everything below.

    Args:
        widths: the fields of `QuantConfig` by keyword.
        attention: attention calls with quantized operands, by module name (`qdiff.tracing.attention_calls`).
        prescaled: names of attention cores that scale q and k before they are quantized.
        split_layers: names of the layers whose input is split, for ``split_shortcut``; None splits all that
            `qdiff.diffusers_backend.structure.mark_concatenations` finds.
        left_in_float: why a module is not quantized, by name.
        fused_projections: whether attention has one layer for q, k and v (``fuse_qkv_projections``).
        ends: names of the first and the last layer, for ``keep_ends``.
        timesteps: the calibrated ones, ascending, of ranges per timestep.
        first_tokens: names of the layers that have an output of the first token, for ``bos_aware``, and whether each
            has the token as well.
        notes: method, calibration and measured error; not used for loading.
        format_version: of what is stored in the component's tensors.

    Raises:
        UserError: a keyword is unknown, a width is out of range, or the format version is not this one.
    """

    def __init__(
        self,
        *,
        attention: dict[str, int] | None = None,
        prescaled: list[str] | None = None,
        split_layers: list[str] | None = None,
        left_in_float: dict[str, str] | None = None,
        fused_projections: bool = False,
        ends: list[str] | None = None,
        timesteps: list[float] | None = None,
        first_tokens: dict[str, bool] | None = None,
        notes: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **widths: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise UserError(
                f"this folder was written in format version {format_version}, and this qdiff reads {FORMAT_VERSION}; "
                + ("update qdiff" if format_version > FORMAT_VERSION else "quantize the pipeline again")
            )
        unknown = sorted(set(widths) - set(WIDTHS))
        if unknown:
            raise UserError(
                f"the quantization config has unknown keys ({', '.join(unknown)}); give {', '.join(WIDTHS)}"
            )
        self.quant_method = Method.QDIFF
        self.quant_config = QuantConfig(**widths)
        self.attention = dict(attention or {})
        self.prescaled = list(prescaled or ())
        self.split_layers = None if split_layers is None else list(split_layers)
        self.left_in_float = dict(left_in_float or {})
        self.fused_projections = fused_projections
        self.ends = None if ends is None else tuple(ends)
        self.timesteps = list(timesteps or ())
        self.first_tokens = dict(first_tokens or {})
        self.notes = dict(notes or {})
        self.format_version = format_version

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values from which `from_dict` makes the same config."""
        others = {
            "attention": self.attention,
            "prescaled": self.prescaled,
            "left_in_float": self.left_in_float,
            "fused_projections": self.fused_projections,
            "ends": list(self.ends or ()),
            "timesteps": self.timesteps,
            "first_tokens": self.first_tokens,
        }
        return {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            **self.quant_config.to_dict(),
            **{name: value for name, value in others.items() if value},
            **({} if self.split_layers is None else {"split_layers": self.split_layers}),
            **({"notes": self.notes} if self.notes else {}),
        }

    def __repr__(self) -> str:
        return f"QDiffConfig({self.to_dict()})"


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = QDiffConfig
