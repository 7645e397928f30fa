"""The interface of a weight format: files of weights that other programs load, written from a `QuantModel`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qdiff.errors import UserError
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
REFUSED, DEQUANTIZED = "refused", "dequantized"


@dataclass(frozen=True)
class WriteOptions:
    """How weights are written.

    Attributes:
        compute_dtype: name of the dtype of all floats in the file: scales and zeros of 4-bit weights, biases, and
            everything that is not quantized. Both programs compute in the dtype of the scales. Scales of 8-bit weights
            are float32 in any case.
        convolutions: what becomes of quantized convolutions, which no format has as integers: ``refused``, or
            ``dequantized``, i.e. written as floats, δ·(q − z).
        linears: likewise for quantized linear layers that do not fit the format.
        as_floats: names of quantized layers that are stored as floats although they fit. ComfyUI tells networks apart
            by the shapes of some weights, and packed weights have another shape.
        prefix: comes before all names, e.g. ``model.diffusion_model.``

    Raises:
        UserError: a value is not one of those above.
    """

    compute_dtype: str = "bfloat16"
    convolutions: str = REFUSED
    linears: str = REFUSED
    as_floats: tuple[str, ...] = ()
    prefix: str = ""

    def __post_init__(self) -> None:
        for name, known in (
            ("compute_dtype", tuple(DTYPES)),
            ("convolutions", (REFUSED, DEQUANTIZED)),
            ("linears", (REFUSED, DEQUANTIZED)),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} is {getattr(self, name)}; give it one of {', '.join(known)}")

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return DTYPES[self.compute_dtype]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a linear layer's weight is stored as integers.

    Attributes:
        name: name of the encoding in the other program.
        inputs: what becomes of the layer's input there, as the end of a sentence.
        why_not: returns why a layer's weight cannot be stored so, given the compute dtype; None if it can.
        tensors: returns the tensors that are stored instead of ``weight``, by the last part of their names.
    """

    name: str
    inputs: str
    why_not: Callable[[QuantModule, torch.dtype], str | None]
    tensors: Callable[[QuantModule, torch.dtype], dict[str, Tensor]]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        files: the files, complete.
        encodings: name of the encoding of each layer that is stored as integers.
        dequantized: why each quantized layer that is stored as floats is not stored as integers, by name.
        notes: what the user should know, one sentence each: which part of the quantized network is not in the files.
    """

    files: tuple[Path, ...]
    encodings: Mapping[str, str]
    dequantized: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """A row of `qdiff.deploy.weight_formats.FORMATS`.

    Attributes:
        name: value of ``--format``.
        title: what it is, as part of a sentence.
        check_target: raises a `UserError` if a path or the options do not suit the format; this needs no network.
        check: also raises one if a network does not. Nothing is written.
        write: checks, writes to a path and says what was written; the network is not changed.
    """

    name: str
    title: str
    check_target: Callable[[Path, WriteOptions], None]
    check: Callable[[QuantModel, Path, WriteOptions], None]
    write: Callable[[QuantModel, Path, WriteOptions], Written]
