"""What a file of weights will hold for each layer: integers, dequantized floats, or floats as they are.

The plan is made, and every layer checked, before anything is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.deploy.weight_format import DEQUANTIZED, Encoding, WriteOptions, Written
from qdiff.errors import UserError, first_few
from qdiff.kernels.packed_weight import PackedWeight
from qdiff.modes import scaled_layers
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import Quantizer


@dataclass(frozen=True)
class WeightPlan:
    """What a file will hold.

    Attributes:
        qnn: the network.
        options: how it is written.
        encodings: the layers that are stored as integers, by name.
        dequantized: why each of the other quantized layers is stored as floats, by name.
    """

    qnn: QuantModel
    options: WriteOptions
    encodings: dict[str, Encoding]
    dequantized: dict[str, str]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the file, on the CPU, by name; the prefix of the options included.

        Raises:
            UserError: a tensor has values that the compute dtype cannot hold, or that are not finite.
        """
        found = {}
        for path, module in self.qnn.model.named_modules(remove_duplicate=False):
            if isinstance(module, Quantizer | PackedWeight):  # parts of a layer, which writes them
                continue
            own = self._tensors_of(path, module) if isinstance(module, QuantModule) else self._floats_of(module)
            for last, tensor in own.items():
                name = f"{path}.{last}".removeprefix(".")
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise UserError(
                        f"{name} has values that are not finite in {self.options.compute_dtype}; give another "
                        "--compute_dtype"
                    )
                found[f"{self.options.prefix}{name}"] = tensor.cpu().contiguous()
        return found

    def _tensors_of(self, path: str, layer: QuantModule) -> dict[str, Tensor]:
        if path in self.encodings:
            own = self.encodings[path].tensors(layer, self.options.dtype)
        else:
            in_float = len(layer.weight_quantizers) == 0
            own = {"weight": self._as_stored(layer.float_weight() if in_float else layer.dequantized_weight())}
        return own if layer.bias is None else {**own, "bias": self._as_stored(layer.bias)}

    def _floats_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a module that is not quantized, without those of its children."""
        state: dict[str, Any] = {}
        module._save_to_state_dict(state, "", keep_vars=False)
        return {name: self._as_stored(value) for name, value in state.items() if isinstance(value, Tensor)}

    def _as_stored(self, tensor: Tensor) -> Tensor:
        """Return a copy on the CPU, so that no two tensors of a file share memory; floats get the compute dtype."""
        dtype = self.options.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to("cpu", dtype, copy=True)

    def written(self, *files: Path) -> Written:
        """Return what a file of these tensors holds."""
        encodings = {name: encoding.name for name, encoding in self.encodings.items()}
        return Written(files, encodings, self.dequantized, self.notes())

    def notes(self) -> tuple[str, ...]:
        """Return what is not in the file although it is part of the quantized network, one sentence each."""
        encodings = {encoding.name: encoding for encoding in self.encodings.values()}
        counts = Counter(encoding.name for encoding in self.encodings.values())
        found = [f"{counts[name]} layers are {name}: {encoding.inputs}" for name, encoding in encodings.items()]
        if quantizers := self.qnn.act_quantizers():
            found.append(f"the quantization of activations is not in the file ({len(quantizers)} quantizers)")
        if self.dequantized:
            count, named = len(self.dequantized), first_few(self.dequantized)
            found.append(f"{count} quantized layers are stored as floats, dequantized: {named}")
        return tuple(found)


def plan_weights(
    qnn: QuantModel, title: str, encoding_of: Callable[[QuantModule], Encoding], options: WriteOptions
) -> WeightPlan:
    """Decide how each layer of a network is stored.

    Args:
        title: name of the format, for errors.
        encoding_of: returns the encoding that suits a layer's width.

    Raises:
        UserError: the weights are not quantized; inputs are scaled; a layer does not fit and the options do not let it
            be dequantized; or no layer would be stored as integers.
    """
    if qnn.config.weight_bits is None:
        raise UserError(f"the weights of this network have no width, and {title} is for quantized ones; give it one")
    qnn.assert_initialised(weights=True, activations=False)
    if qnn.config.bos_aware:
        raise UserError(
            f"{title} has no place for outputs of the first token, which --bos_aware leaves in float; calibrate "
            "without --bos_aware"
        )
    if scaled := scaled_layers(qnn.model):
        raise UserError(
            f"{scaled[0]} multiplies its input's channels by factors (--scaling), for which {title} has no place; "
            "calibrate without --scaling"
        )
    layers = layers_by_every_name(qnn)
    if unknown := [name for name in options.as_floats if name not in layers]:
        raise UserError(f"--as_floats names {unknown[0]}, which is not a quantized layer; give names of its layers")
    encodings = {name: encoding_of(layer) for name, layer in layers.items()}
    reasons = {name: encodings[name].why_not(layer, options.dtype) for name, layer in layers.items()}
    reasons |= {name: "in --as_floats" for name in options.as_floats}
    dequantized = {name: reason for name, reason in reasons.items() if reason is not None}
    _check_allowed({name: layers[name] for name in dequantized}, dequantized, len(layers), title, options)
    if len(dequantized) == len(layers):
        raise UserError(f"no layer fits {title}: {first_few(dequantized)}; use another --format")
    return WeightPlan(qnn, options, {n: e for n, e in encodings.items() if n not in dequantized}, dequantized)


def _check_allowed(
    layers: dict[str, QuantModule], reasons: dict[str, str], total: int, title: str, options: WriteOptions
) -> None:
    """Raise a `UserError` if a layer that is not stored as integers may not be dequantized either."""
    options_of = {name: "linears" if layer.geometry is None else "convolutions" for name, layer in layers.items()}
    refused = {
        name: reasons[name]
        for name, option in options_of.items()
        if name not in options.as_floats and getattr(options, option) != DEQUANTIZED
    }
    if refused:
        fixes = " and ".join(f"--{option} {DEQUANTIZED}" for option in sorted({options_of[name] for name in refused}))
        raise UserError(
            f"{len(refused)} of {total} quantized layers do not fit {title}: {first_few(refused)}; "
            f"give {fixes} to store them as floats"
        )


def layers_by_every_name(qnn: QuantModel) -> dict[str, QuantModule]:
    """Return the layers with quantized weights; one that is used in several places comes under each of its names."""
    named = qnn.model.named_modules(remove_duplicate=False)
    return {n: module for n, module in named if isinstance(module, QuantModule) and len(module.weight_quantizers)}
