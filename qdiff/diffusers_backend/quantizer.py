"""The quantization backend that diffusers calls while it loads and saves a component."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from qdiff.diffusers_backend.card import writes_card
from qdiff.diffusers_backend.component_timesteps import follow_timesteps
from qdiff.diffusers_backend.component_tokens import watch_first_tokens
from qdiff.diffusers_backend.config import QDiffConfig
from qdiff.diffusers_backend.refusals import refuse_changes
from qdiff.diffusers_backend.structure import pack_without_values, replace_layers, switch_on
from qdiff.errors import UserError
from qdiff.machine.memory import return_freed_memory
from qdiff.modes import quantized_layers
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import Quantizer

RETURNED_AT_A_TIME = 64 << 20  # bytes: returning takes milliseconds


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
        self._freed = 0  # bytes of float weights since memory was returned
        self._step_sizes: dict[str, Tensor] = {}  # read and not yet used
        self._shapes: dict[str, torch.Size] = {}  # of the component's tensors
        needing = {"act_bits": "quantized activations need", "bos_aware": "outputs of the first token need"}
        for name, needs in needing.items() if not self.pre_quantized else ():
            if getattr(quantization_config.quant_config, name):
                raise UserError(
                    f"{needs} calibration data; load the pipeline in float and call qdiff.quantize_pipeline, or leave "
                    f"out {name}"
                )

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if importlib.util.find_spec("accelerate") is None:
            raise UserError('quantized components are loaded with accelerate; run pip install "qdiff[diffusers]"')

    # Loading

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: Sequence[str] = (), **_: Any
    ) -> nn.Module:
        replace_layers(model, self.quantization_config)
        if self.pre_quantized:
            pack_without_values(model)
            for name, layer in quantized_layers(model).items():
                if set(name.split(".")) & set(keep_in_fp32_modules):
                    layer.weight = layer.weight.float()
            self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Check a file's tensors, and keep step sizes as they are in it, before diffusers casts them."""
        if self.pre_quantized:
            for name, tensor in state_dict.items():
                if self._shapes.get(name) != tensor.shape:
                    expected = f"of shape {tuple(self._shapes[name])}" if name in self._shapes else "not there"
                    raise UserError(
                        f"{name} has the shape {tuple(tensor.shape)} in the files and is {expected} in the network "
                        "that their config.json describes; the folder mixes two models, quantize the pipeline again"
                    )
            self._step_sizes |= {n: t.float() for n, t in state_dict.items() if n.endswith(".delta")}
        return state_dict

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Leave out what quantization makes while float weights are loaded."""
        if self.pre_quantized:
            if missing_keys:
                raise UserError(
                    f"{len(missing_keys)} tensors of this {type(model).__name__} are missing in its files, e.g. "
                    f"{min(missing_keys)}; copy the folder again, with all its shards"
                )
            return missing_keys
        made = tuple(f"{name}." for name in quantized_layers(model))
        return [n for n in missing_keys if not (n.startswith(made) and n.rpartition(".")[2] not in ("weight", "bias"))]

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        if self.pre_quantized:
            path = param_name.rpartition(".")[0]
            return param_name in self._step_sizes and isinstance(model.get_submodule(path), Quantizer)
        return True

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, *_: Any, **__: Any
    ) -> None:
        path, _, leaf = param_name.rpartition(".")
        device = torch.device(target_device)
        if self.pre_quantized:
            value = self._step_sizes.pop(param_name).to(device)
            setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))
            return
        layer = self._layer(model, param_name)
        if layer is None:
            owner, value = model.get_submodule(path), param_value.to(device, copy=True)  # a view would keep its file
            if leaf in owner._parameters:
                value = nn.Parameter(value, requires_grad=False)
            setattr(owner, leaf, value)
            return
        layer.weight = nn.Parameter(param_value.to(device), requires_grad=False)
        layer.weight_int = torch.empty_like(layer.weight, dtype=torch.uint8)
        layer.weight_quantizers.to(device)
        layer.init_weight_ranges(self.quantization_config.quant_config.weight_range)
        layer.pack()
        self._freed += param_value.numel() * torch.float32.itemsize
        if self._freed > RETURNED_AT_A_TIME:
            return_freed_memory()
            self._freed = 0

    def _layer(self, model: nn.Module, name: str) -> QuantModule | None:
        """Return the quantized layer whose float weight has this name."""
        path, _, leaf = name.rpartition(".")
        if leaf != "weight":
            return None
        module = model.get_submodule(path)
        return module if isinstance(module, QuantModule) and len(module.weight_quantizers) else None

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        switch_on(model)
        follow_timesteps(model)
        watch_first_tokens(model)
        refuse_changes(model)
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
