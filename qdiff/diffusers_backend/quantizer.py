"""The quantization backend that diffusers calls while it loads and saves a component."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from qdiff.diffusers_backend.card import writes_card
from qdiff.diffusers_backend.config import QDiffConfig
from qdiff.diffusers_backend.structure import pack_without_values, quantized_layers, replace_layers, switch_on
from qdiff.errors import UserError
from qdiff.quant_layer import QuantModule

WIDE = ".delta"  # names of step sizes end so; they keep float32 whatever dtype the component is loaded in


class QDiffQuantizer(DiffusersQuantizer):
    """Loads packed integers, or packs float weights one by one while they are loaded.

    Args:
        quantization_config: of the component.
        pre_quantized: whether the files hold integers.

    Raises:
        UserError: activations are to be quantized without calibration.
    """

    use_keep_in_fp32_modules = True  # layers that the component's class keeps in float32 stay so

    def __init__(self, quantization_config: QDiffConfig, **keywords: Any) -> None:
        super().__init__(quantization_config, **keywords)
        self._step_sizes: dict[str, Tensor] = {}
        if not self.pre_quantized and quantization_config.quant_config.act_bits is not None:
            raise UserError(
                "quantized activations need calibration data; load the pipeline in float and call "
                "qdiff.quantize_pipeline, or leave out act_bits"
            )

    # Loading

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        replace_layers(model, self.quantization_config)
        if self.pre_quantized:
            pack_without_values(model)
        return model

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep step sizes as they are in the file, before diffusers casts them."""
        self._step_sizes |= {name: t.float() for name, t in state_dict.items() if name.endswith(WIDE)}
        return state_dict

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Leave out what quantization makes while float weights are loaded."""
        if self.pre_quantized:
            if missing_keys:
                raise UserError(
                    f"the files of this {type(model).__name__} miss {len(missing_keys)} tensors, e.g. "
                    f"{min(missing_keys)}; copy the folder again, with all its shards"
                )
            return missing_keys
        made = tuple(f"{name}." for name in quantized_layers(model))
        return [n for n in missing_keys if not (n.startswith(made) and n.rpartition(".")[2] not in ("weight", "bias"))]

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        return param_name in self._step_sizes or (not self.pre_quantized and self._layer(model, param_name) is not None)

    def check_quantized_param_shape(self, name: str, expected: Tensor, given: Tensor) -> None:
        raise UserError(
            f"{name} has the shape {tuple(given.shape)} in the file, but its config.json describes another model, "
            f"of shape {tuple(expected.shape)}; quantize the pipeline again, or restore its config.json"
        )

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *_: Any, **__: Any
    ) -> None:
        path, _, leaf = param_name.rpartition(".")
        device = torch.device(target_device)
        if param_name in self._step_sizes:
            value = self._step_sizes.pop(param_name).to(device)
            setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
            return
        layer = self._layer(model, param_name)
        layer.weight = nn.Parameter(param_value.to(device), requires_grad=False)
        layer.weight_int = torch.empty_like(layer.weight, dtype=torch.uint8)
        layer.weight_quantizers.to(device)
        layer.init_weight_ranges(self.quantization_config.quant_config.weight_range)
        layer.pack()

    def _layer(self, model: nn.Module, name: str) -> QuantModule | None:
        """Return the quantized layer whose float weight has this name."""
        path, _, leaf = name.rpartition(".")
        if leaf != "weight":
            return None
        module = model.get_submodule(path)
        return module if isinstance(module, QuantModule) and len(module.weight_quantizers) else None

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        switch_on(model)
        writes_card(model)
        return model

    # Saving

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return self.quantization_config.quant_config.act_bits is None
