"""A float network with its leaves replaced by quantized ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.config import Ablation, QuantConfig
from qdiff.errors import UserError
from qdiff.interface import family_of
from qdiff.kernels.integer_matmul import check_integer_products, int8_is_exact
from qdiff.kernels.packed_weight import WeightCache
from qdiff.modes import leaf_modes, leaves
from qdiff.modulation import memories
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import ActQuantizer, Quantizer, calibrated_act_quantizers
from qdiff.weight_forms import WeightForm
from qdiff.wrapping import replace_leaves


class QuantModel(nn.Module):
    """Wraps a denoising network for post-training quantization.

    The network's layers are replaced in place (parameters are shared, not copied), its parameters are frozen, and
    the whole is put in eval mode: reconstruction and sampling run without dropout. Outside of `quantized` it
    computes what the float network computed.

    Args:
        network: float weights loaded; a `qdiff.interface.SteppedNetwork` where it is to be calibrated.
        config: widths and ranges.

    ``qnn(x, t, context)``: x [N, C, H, W], t [N], context [N, L, D] or None → [N, C, H, W]. Keywords are passed on, and
    an attribute that this class does not have is the network's; ``config``, which both may have, is this class's, and
    the network's own is ``qnn.model.config``.

    Attributes:
        left_in_float: layers with products that are not quantized, by name, each with the reason.
    """

    def __init__(self, network: nn.Module, config: QuantConfig) -> None:
        super().__init__()
        if leaves(network):
            raise UserError(f"this {type(network).__name__} is quantized already; wrap a float network")
        self.config = config
        self.family = family_of(network)
        self.model = network
        ends = self.family.ends
        if config.keep_ends and ends is None:
            raise UserError(f"the first and last layer of {type(network).__name__} are not known; leave out keep_ends")
        self.left_in_float = replace_leaves(network, config, ends)
        if not leaves(network):
            raise UserError(f"{type(network).__name__} has no layer that can be quantized")
        device = self.device
        if device.type != "meta":  # of a network without values, the quantizers have theirs on the CPU
            for module in network.modules():
                if isinstance(module, Quantizer):
                    module.to(device)
        self.requires_grad_(False)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            network = self.__dict__.get("_modules", {}).get("model")
            if network is None or name.startswith("__"):
                raise
            return getattr(network, name)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the network's parameters."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def forward(self, *inputs: Tensor | None, **keywords: Any) -> Tensor:
        while inputs and inputs[-1] is None:  # an absent condition is not passed on
            inputs = inputs[:-1]
        if self.config.ablation is Ablation.CLEARED_STATE:
            for layer in self.layers().values():
                if layer.memory is not None:
                    layer.memory.clear()
        return self.model(*inputs, **keywords)

    def train(self, mode: bool = True) -> QuantModel:
        """Stay in eval mode: neither reconstruction nor sampling may run with dropout."""
        return super().train(False)

    def layers(self) -> dict[str, QuantModule]:
        """Return the quantized convolutions and linear layers by their name in the float network."""
        return {n: m for n, m in self.model.named_modules() if isinstance(m, QuantModule)}

    def act_quantizers(self) -> dict[str, ActQuantizer]:
        """Return all activation quantizers by name."""
        return {n: m for n, m in self.model.named_modules() if isinstance(m, ActQuantizer)}

    def calibrated_act_quantizers(self) -> dict[str, ActQuantizer]:
        """Return those whose range is state, not dynamic."""
        return calibrated_act_quantizers(self.model)

    @contextlib.contextmanager
    def quantized(self, weights: bool = True, activations: bool = True) -> Iterator[QuantModel]:
        """Quantize inside the block; a side whose width is None stays in float.

        Raises:
            UserError: a quantizer that would be used was never set (no calibration, no checkpoint loaded).
        """
        self.assert_initialised(weights, activations)
        with leaf_modes([self.model], weights=weights, activations=activations):
            yield self

    @contextlib.contextmanager
    def trajectory(self) -> Iterator[QuantModel]:
        """Run one batch through a sampling trajectory: modulated layers remember the step before inside the block.

        A new batch needs a new block. What is remembered is given up at the end, also on an exception. Without
        modulation it does nothing.

        Raises:
            RuntimeError: a trajectory is open already.
        """
        with memories(self.layers(), self.config.ablation is not Ablation.NO_COMPENSATION):
            yield self

    def assert_initialised(self, weights: bool = True, activations: bool = True) -> None:
        """Raise a `UserError` naming the first quantizer of the kinds asked for that was never set."""
        kinds = {"activation": activations, "weight": weights}
        found = {n: m for n, m in self.model.named_modules() if isinstance(m, Quantizer) and kinds[_kind(m)]}
        if not found:
            return
        # Stacked: read one by one, each would make the host wait for the GPU.
        flags = torch.stack([m.initialised for m in found.values()]).tolist()
        for (name, module), initialised in zip(found.items(), flags, strict=True):
            if not initialised:
                raise UserError(
                    f"the {_kind(module)} quantizer {name} has no range; calibrate the network or load a checkpoint "
                    "first"
                )

    def release_float_weights(self) -> None:
        """Give up the float weights: from now on only ``quantized(weights=True)`` works, at the memory cost of float.

        Native files can be written and loaded afterwards, published ones only loaded, and a state dict not at all.

        Raises:
            UserError: a weight quantizer was never set.
        """
        self.assert_initialised(weights=True, activations=False)
        for layer in self.layers().values():
            layer.release_float_weight()

    def pack_weights(self, cache_bytes: int = 0, integer: bool = False) -> None:
        """Keep nothing of the weights but their integers at their width, from now on; called again, it changes how.

        ``with qnn.quantized():`` then dequantizes no weight beforehand. Each layer does so for its call, and computes
        bit for bit what it computed before. Only native files can be written afterwards, and nothing be loaded; float
        weights, calibration, state dicts and published files are a `UserError`.

        Args:
            cache_bytes: dequantized weights kept from call to call, of all layers together (`WeightCache`).
            integer: quantized inputs meet quantized weights as integers (`qdiff.kernels.integer_matmul`), with the
                result of the simulation up to float32's rounding. Attention's two products stay simulated, and so do
                layers whose input is in float: outside of ``quantized(activations=True)``, under ``keep_ends`` the last
                one, and in a modulated network without ``rest_bits`` the first step.

        Raises:
            UserError: the weights have no width or were never quantized, or ``integer`` is asked for where the
                activations have no width, where ranges differ by channel, or of a layer with groups.
        """
        if self.config.weight_bits is None:
            raise UserError("the weights of this network have no width to be packed to; add --ptq and --weight_bit")
        self.assert_initialised(weights=True, activations=False)
        if integer:
            self._assert_multiplies_integers()
            int8_is_exact(self.device)  # found out now: this waits for the device, and no network call should
        cache = WeightCache(cache_bytes)
        for layer in self.layers().values():
            layer.pack()
            layer.packed.cache, layer.packed.multiplies_integers = cache, integer and len(layer.act_quantizers) > 0

    def _assert_multiplies_integers(self) -> None:
        check_integer_products(self.config)
        for name, layer in self.layers().items():
            layer.assert_multiplies_integers(name)

    @property
    def is_packed(self) -> bool:
        """Whether `pack_weights` was called."""
        return any(layer.form is WeightForm.PACKED for layer in self.layers().values())

    def reset_fired(self) -> None:
        """Start counting anew how often each activation quantizer fires."""
        for quantizer in self.act_quantizers().values():
            quantizer.fired = 0

    def silent_quantizers(self) -> list[str]:
        """Return the activation quantizers that did not fire since the last reset."""
        return [name for name, quantizer in self.act_quantizers().items() if quantizer.fired == 0]

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        for layer in self.layers().values():  # before anything is loaded
            layer.assert_loads_state_dict()
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where the network is; the shapes that packed layers keep of their float weights are nowhere."""
        parameters = list(self.parameters())
        return next((p for p in parameters if not p.is_meta), parameters[0]).device


def _kind(quantizer: Quantizer) -> str:
    return "activation" if isinstance(quantizer, ActQuantizer) else "weight"
